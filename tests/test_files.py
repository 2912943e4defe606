"""JSON that is checked as it is read, and files that replace others when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

import pytest

from regroup.files import bounded, parse_json, replacing


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "[1e999]"])
def test_numbers_that_are_not_finite(text: str) -> None:
    assert parse_json(text.encode()) is not None
    with pytest.raises(ValueError, match="not a finite number"):
        parse_json(text.encode(), strict=True)


def test_whole_numbers_beyond_floating_point() -> None:
    text = 400 * "9"
    assert parse_json(text.encode(), strict=True) == 10**400 - 1
    with pytest.raises(ValueError, match="not a finite number"):
        parse_json(text.encode(), whole=bounded)


@pytest.mark.parametrize("strict", [False, True])
def test_json_is_read_as_the_library_reads_it(strict: bool) -> None:
    text = '{"a": [1, -2.5, 1e-400, true, null, "ü\\u2028"], "b": {"c": 9007199254740993}}'
    assert parse_json(text.encode(), strict=strict) == json.loads(text)
    with pytest.raises(ValueError, match="surrogates"):
        parse_json(b'"\\ud800"', strict=strict)


def test_a_file_is_replaced_when_the_block_ends_well(tmp_path: Path) -> None:
    path, link = tmp_path / "new/file", tmp_path / "link"
    for words in ("first", "second"):
        with replacing(path) as stage:
            assert stage != path
            stage.write_text(words)
        assert path.read_text() == words
        path.chmod(0o640)
    link.symlink_to(path)
    with contextlib.suppress(KeyError), replacing(link) as stage:
        stage.write_text("third")
        raise KeyError
    assert path.read_text() == "second"
    with replacing(link) as stage:
        stage.write_text("fourth")
    assert link.is_symlink()
    assert path.read_text() == "fourth"
    assert path.stat().st_mode & 0o777 == 0o640
    assert sorted(p.name for p in path.parent.iterdir()) == ["file"]


def test_what_is_no_file_is_written_as_it_stands() -> None:
    with replacing(Path(os.devnull)) as stage:
        assert stage == Path(os.devnull)


def test_a_pipe_without_a_path_is_written_to() -> None:
    """``-o /dev/stdout | jq`` and ``-o >(jq)``: what such a name resolves to, pipe:[1234], does not exist."""
    reading, writing = os.pipe()
    path = Path(f"/dev/fd/{writing}")
    assert not path.resolve().exists()
    with os.fdopen(reading, "rb") as pipe:
        with replacing(path) as stage:
            stage.write_text("{}")
        os.close(writing)
        assert pipe.read() == b"{}"
