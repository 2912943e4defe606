"""Text of any bytes: a figure that stands, or a refusal; and what is no file, read once or refused by what it is."""

from __future__ import annotations

import gzip
import json
import math
import os
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers import INDEX, copy, refused, run
from regroup import files
from regroup.data import read_pairs, read_texts
from regroup.data.sources import find_sources
from regroup.errors import RegroupError

# JSON of any shape, its strings of any code points, lone surrogates among them.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(st.fixed_dictionaries({"text": st.text(st.characters(), max_size=80)}) | ANYTHING, max_size=4)
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def judged(shop: Path, data: Path) -> None:
    """Evaluate on a file: figures that can be, or a refusal in words."""
    record = data.with_name("record.json")
    record.unlink(missing_ok=True)
    status, out, message = run("evaluate", shop / "parent", "--data", data, "--window", 8, "-o", record)
    if status == 0:
        found = json.loads(record.read_text(encoding="utf-8"))["results"]
        assert found["rows"] >= 1
        assert 0 < found["nats_per_token"] < 50
        assert 0 < found["bits_per_byte"] < math.inf
    else:
        assert status == 2
        assert "\nerror: " in f"\n{message}", message
        assert not record.exists()
    assert "Traceback" not in out + message


@QUICK
@given(raw=st.binary(max_size=300) | st.text(st.characters(codec="utf-8"), max_size=200).map(str.encode))
@example(raw=b"\xef\xbb\xbfto be or not to be")
@example(raw=b"<s></s><unk>" * 50)
@example(raw="步".encode() * 60)
@example(raw=b"\x00" * 100)
@example(raw=b"to be or not to be " * 10)
def test_text_of_any_bytes(raw: bytes, shop: Path, tmp_path: Path) -> None:
    data = tmp_path / "any.txt"
    data.write_bytes(raw)
    judged(shop, data)


@QUICK
@given(rows=ROWS)
@example(rows=[{"text": "\ud800" * 30}])
@example(rows=[{"text": "to be or not to be " * 5}])
def test_json_rows_of_any_kind(rows: list[object], shop: Path, tmp_path: Path) -> None:
    data = tmp_path / "any.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    judged(shop, data)


def test_rows_that_are_nested_without_end(shop: Path, tmp_path: Path) -> None:
    data = tmp_path / "deep.jsonl"
    data.write_text('{"text":' + "[" * 100_000 + "]" * 100_000 + "}\n", encoding="utf-8")
    assert "a line is not valid JSON" in refused("evaluate", shop / "parent", "--data", data, "--window", 16)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "config.json",
        "generation_config.json",
        INDEX,
    ],
)
@pytest.mark.parametrize("text", ['{"a":' * 50_000 + "1" + "}" * 50_000, "[" * 100_000, '{"a": "\\ud800"}', "\udcff"])
def test_files_of_a_checkpoint_that_are_nested_or_no_unicode(name: str, text: str, shop: Path, tmp_path: Path) -> None:
    folder = copy(shop / "parent", tmp_path / "p")
    (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    status, _, message = run("evaluate", folder, "--data", shop / "held-out.txt", "--window", 16, "--windows", 2)
    # What the loss does not depend on may be as it is: an index next to a single file, defaults of generation.
    assert status == 2 or name not in ("config.json", "tokenizer.json"), message
    assert "Traceback" not in message
    if name in ("config.json", INDEX):
        assert name in refused("inspect", folder)


@pytest.mark.parametrize("what", ["plan", "task", "recipe", "against"])
def test_what_else_is_read_and_is_nested(what: str, shop: Path, tmp_path: Path) -> None:
    file = tmp_path / f"deep.{what}"
    file.write_text("[" * 100_000, encoding="utf-8")
    task = tmp_path / "task.yaml"
    (tmp_path / "rows.tsv").write_text("a\tb\n", encoding="utf-8")
    task.write_text("data: rows.tsv\n", encoding="utf-8")
    arguments: dict[str, list[object]] = {
        "plan": ["convert", shop / "parent", tmp_path / "c", "--plan", file],
        "task": ["evaluate", shop / "parent", "--task", file],
        "recipe": ["uptrain", "--recipe", file],
        "against": ["evaluate", shop / "parent", "--task", task, "--against", file],
    }
    assert str(file) in refused(*arguments[what])


def fed(path: Path, raw: bytes) -> threading.Thread:
    """A named pipe, and somebody who writes to it."""
    os.mkfifo(path)
    writer = threading.Thread(target=path.write_bytes, args=(raw,))
    writer.start()
    return writer


@pytest.mark.parametrize(
    ("raw", "texts"),
    [
        (b"to be\nor not\n", ["to be\nor not\n"]),
        (b'{"text": "a"}\n\n{"text": "b"}\n', ["a", "b"]),
        (gzip.compress(b'{"text": "a"}\n{"text": "b"}\n', mtime=0), ["a", "b"]),
        (b"{not json\n" * 40_000, ["{not json\n" * 40_000]),
    ],
)
def test_a_pipe_is_read_once(raw: bytes, texts: list[str], tmp_path: Path) -> None:
    writer = fed(tmp_path / "pipe", raw)
    assert list(read_texts(tmp_path / "pipe")) == texts
    writer.join()


def test_a_pipe_of_pairs(tmp_path: Path) -> None:
    writer = fed(tmp_path / "pipe", b"a\tb\nc\td\n")
    assert list(read_pairs(tmp_path / "pipe")) == [("a", "b"), ("c", "d")]
    writer.join()


def test_a_pipe_gives_what_the_file_gives(shop: Path, tmp_path: Path) -> None:
    scores = []
    for name in ("file", "pipe", "folder"):
        data = tmp_path / name
        raw = (shop / "held-out.txt").read_bytes()
        writer = fed(data, raw) if name == "pipe" else None
        if name == "folder":
            data.mkdir()
        if name != "pipe":
            (data / "a.txt" if name == "folder" else data).write_bytes(raw)
        status, out, message = run("evaluate", shop / "parent", "--data", data, "--window", 32)
        assert status == 0, message
        scores.append(out)
        if writer is not None:
            writer.join()
    assert len(set(scores)) == 1


def test_calibration_and_plans_come_through_pipes(shop: Path, tmp_path: Path) -> None:
    status, plan, _ = run("plan", shop / "parent", "--kv-heads", 2, "--method", "mean")
    assert status == 0
    writer = fed(tmp_path / "plan", plan.encode())
    status, _, message = run("convert", shop / "parent", tmp_path / "c", "--plan", tmp_path / "plan")
    assert status == 0, message
    writer.join()
    writer = fed(tmp_path / "text", (shop / "train.txt").read_bytes())
    options = ["--calibration-window", 16, "--calibration-tokens", 256, "--dry-run", "--kv-heads", 2]
    status, _, message = run("convert", shop / "parent", tmp_path / "d", "--calibration", tmp_path / "text", *options)
    assert status == 0, message
    writer.join()


def test_pipes_that_end_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PIPE_TIMEOUT", 0.01)
    os.mkfifo(tmp_path / "silent")
    with pytest.raises(RegroupError, match="a pipe that nobody writes to"):
        list(read_texts(tmp_path / "silent"))
    writer = fed(tmp_path / "empty", b"")
    monkeypatch.setattr(files, "PIPE_TIMEOUT", 10.0)
    with pytest.raises(RegroupError, match="the data is empty"):
        list(read_texts(tmp_path / "empty"))
    writer.join()
    with pytest.raises(RegroupError, match="a device"):
        list(read_texts("/dev/zero"))
    with pytest.raises(RegroupError, match="a pipe, which can be read once"):
        find_sources([str(tmp_path / "silent")], pairs=False)
    monkeypatch.setattr("regroup.data.sources._MOST_PIPED", 1000)
    reader = os.open(tmp_path / "silent", os.O_RDWR)
    os.write(reader, b"x" * 1001)
    with pytest.raises(RegroupError, match="holds more than"):
        list(read_texts(tmp_path / "silent"))
    os.close(reader)
