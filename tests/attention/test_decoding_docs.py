"""The snippets of docs/decoding.md, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import regroup.demo

PAGE = Path(__file__).parents[2] / "docs" / "decoding.md"
PARENT = Path(regroup.demo.__file__).parent / "parent"


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoint").symlink_to(PARENT)
    snippets = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    assert len(snippets) == 3
    names: dict[str, Any] = {}
    exec(snippets[0], names)
    stock = names["regroup"].load("checkpoint", dtype=torch.float32, attn_implementation="eager")
    wanted = stock.generate(**names["inputs"], max_new_tokens=20, do_sample=False)
    assert torch.equal(names["written"], wanted)
    exec(snippets[1], names)
    assert names["model"].config._attn_implementation == "regroup"
    exec(snippets[2], names)
    torch.testing.assert_close(torch.cat(names["parts"], 1), names["out"], atol=1e-5, rtol=1e-4)
