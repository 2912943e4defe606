"""docs/benchmarks.md agrees with the records."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # as it is for a program there
    spec = importlib.util.spec_from_file_location("report", ROOT / "benchmarks/report.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_is_of_the_records(report: Any) -> None:
    assert (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8") == report.page()


def test_another_record_makes_another_page(report: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = json.loads((report.RECORDS / "decode-engines.json").read_text(encoding="utf-8"))
    for pair in record["results"]["pairs"]:
        for case in pair["cases"]:
            case["token_ms"]["regroup"] = dict.fromkeys(("p20", "p50", "p80"), 1e4)
            case["regroup_is_faster_by"] = 0.01
    (tmp_path / "decode-engines.json").write_text(json.dumps(record))
    monkeypatch.setattr(report, "RECORDS", tmp_path)
    page = report.page()
    assert "10000" in page
    # Every goal that is decided is missed then.
    assert "| reached |" not in page
    assert "**not reached**" in page
