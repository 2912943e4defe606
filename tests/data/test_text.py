"""Reading text and pairs, and cutting windows of tokens, against plain loops."""

from __future__ import annotations

import gzip
import json
from functools import partial
from pathlib import Path

import pytest
import torch

import texts
from regroup import RegroupError
from regroup.data import document_windows, read_pairs, read_texts, text, token_windows
from regroup.data.text import check_window


def test_text_files_are_one_document(tmp_path: Path) -> None:
    content = "one\n\ntwo\r\nthree ü\n"
    (tmp_path / "a.txt").write_bytes(content.encode())
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(content.encode()))
    for name in ("a.txt", "a.txt.gz"):
        assert list(read_texts(tmp_path / name)) == [content]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    rows = [{"text": "one\ntwo", "id": 1}, {"text": ""}, {"text": "ü"}]
    lines = "\n\n".join(map(json.dumps, rows)) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(read_texts(tmp_path / name)) == ["one\ntwo", "", "ü"]


def test_lines_end_with_line_feeds_alone(tmp_path: Path) -> None:
    odd = "a\u2028b\x85c\x0cd"
    (tmp_path / "a.jsonl").write_bytes(json.dumps({"text": odd}, ensure_ascii=False).encode() + b"\r\n")
    assert list(read_texts(tmp_path / "a.jsonl")) == [odd]
    (tmp_path / "a.tsv").write_bytes(f"{odd}\tx\r\ny\tz".encode())
    assert list(read_pairs(tmp_path / "a.tsv")) == [(odd, "x"), ("y", "z")]


def test_pairs(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("a b\tc\nd\te f\n")
    rows = [{"source": "a b", "target": "c"}, {"source": "d", "target": "e f"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.tsv", "a.jsonl"):
        assert list(read_pairs(tmp_path / name)) == [("a b", "c"), ("d", "e f")]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"", "is empty"),
        ("a.txt", b" \n", "holds no text"),
        ("a.txt", b"ab\xffc", r"not UTF-8[\s\S]*byte 2"),
        ("a.txt.gz", b"not gzip", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 99, mtime=0)[:-9], "cannot be read"),
        ("a.txt.gz", gzip.compress(b"x" * 9999, mtime=0)[:12] + b"\xff" * 9, "cannot be read"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', r"a\.jsonl:2"),
        ("a.jsonl", b'{"text": "x"}\n\n[1]\n', r"a\.jsonl:3"),
        ("a.jsonl", b'{"text": 7}', r"not hold what it should[\s\S]*a\.jsonl:1"),
        ("a.jsonl", b'{"txt": "x"}', "not hold what it should"),
        ("a.jsonl", b"[" * 100_000, "not valid JSON"),
    ],
)
def test_texts_that_cannot_be_read(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RegroupError, match=words):
        list(read_texts(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.tsv", "", "empty"),
        ("a.tsv", "a\tb\nc\n", r"a\.tsv:2"),
        ("a.tsv", "a\tb\tc\n", r"a\.tsv:1"),
        ("a.jsonl", '{"source": "a"}', r"a\.jsonl:1"),
        ("a.jsonl", '{"source": "a", "target": 1}', "not hold what it should"),
    ],
)
def test_pairs_that_cannot_be_read(name: str, content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(RegroupError, match=words):
        list(read_pairs(tmp_path / name))


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "x.txt", "cannot be read"), (tmp_path, "holds no data")):
        with pytest.raises(RegroupError, match=words):
            list(read_texts(path))


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_windows_follow_each_other(bos: bool, eos: bool) -> None:
    tokenizer = texts.tokenizer(bos=bos, eos=eos)
    documents = ["the cat sat on", "the mat", "", "cats " * 9]
    stream: list[int] = []
    for number, document in enumerate(documents):
        stream += [2] * (number > 0 and eos) + tokenizer(document, add_special_tokens=False)["input_ids"]
    windows, _ = token_windows(documents, tokenizer, length=7)
    body = 6 if bos else 7
    assert windows.shape == (len(stream) // body, 7)
    assert windows.dtype == torch.int64
    assert windows[:, int(bos) :].flatten().tolist() == stream[: len(stream) // body * body]
    if bos:
        assert windows[:, 0].tolist() == [1] * len(windows)
        plain, _ = token_windows(documents, tokenizer, length=7, bos=False)
        assert plain.flatten().tolist() == stream[: len(stream) // 7 * 7]
    limited, _ = token_windows(documents, tokenizer, length=7, limit=2)
    assert torch.equal(limited, windows[:2])


def test_windows_from_document_starts() -> None:
    tokenizer = texts.tokenizer()
    documents = ["the cat sat on the mat", "cat", "naïve café: 步步 🙂", "42 cats or the hat is flat"]
    windows, nbytes = token_windows(documents, tokenizer, length=6, document_starts=True)
    ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in documents]
    assert windows.tolist() == [[1, *row[:5]] for row in ids if len(row) >= 5]
    predicted = [tokenizer.decode(row[:5]) for row in ids if len(row) >= 5]
    assert nbytes == sum(len(text.encode()) for text in predicted)
    limited, _ = token_windows(documents, tokenizer, length=6, document_starts=True, limit=1)
    assert limited.tolist() == windows[:1].tolist()


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("document", ["the cat sat on the mat; " * 5, " cat\n\n the\n" * 9, "naïve café " * 6])
def test_bytes_are_those_of_the_predicted_text(document: str, bos: bool) -> None:
    """One window over the whole text: its bytes, less those of a first token that is given."""
    tokenizer = texts.tokenizer(bos=bos)
    ids = tokenizer(document, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == document
    _, nbytes = token_windows([document], tokenizer, length=len(ids) + bos)
    given = 0 if bos else len(tokenizer.decode(ids[:1]).encode())
    assert nbytes == len(document.encode()) - given


def test_special_tokens_hold_no_bytes() -> None:
    tokenizer = texts.tokenizer()
    documents = ["the cat", "the mat", "cats"]
    ids = [tokenizer(x, add_special_tokens=False)["input_ids"] for x in documents]
    length = sum(map(len, ids)) + 2 + 1
    windows, nbytes = token_windows(documents, tokenizer, length=length)
    assert windows[0].tolist().count(2) == 2
    assert nbytes == sum(len(x) for x in documents)


def test_less_text_than_a_window() -> None:
    for starts in (False, True):
        with pytest.raises(RegroupError, match=r"less text[\s\S]*at least 99 tokens[\s\S]*--window"):
            token_windows(["the cat"], texts.tokenizer(), length=99, document_starts=starts)


def test_messages_name_the_file_and_the_option() -> None:
    for cut in (partial(token_windows, limit=3), partial(document_windows, limit=3)):
        with pytest.raises(RegroupError) as error:
            cut(["the cat"], texts.tokenizer(), length=99, file="a.txt", option="--some-window")
        assert error.value.details["file"] == "a.txt"
        assert "a shorter --some-window" in str(error.value.details["remedy"])


@pytest.mark.parametrize("name", ["max_position_embeddings", "n_positions"])
def test_windows_longer_than_the_positions(name: str) -> None:
    check_window({name: 64}, 64)
    check_window({name: None}, 65)
    check_window({}, 65)
    with pytest.raises(
        RegroupError, match=r"longer than the model's positions[\s\S]*at most 64[\s\S]*pass --window 64"
    ):
        check_window({name: 64}, 65)
    with pytest.raises(RegroupError, match="pass --some-window 64"):
        check_window({name: 64}, 65, option="--some-window")


def test_data_without_text_has_a_remedy(tmp_path: Path) -> None:
    for name, content, read in (("a.txt", " \n", read_texts), ("a.jsonl", "\n\n", read_pairs)):
        (tmp_path / name).write_text(content)
        with pytest.raises(RegroupError, match="the data holds no") as error:
            list(read(tmp_path / name))
        assert str(error.value.details["remedy"]).startswith("give a file with")


def test_long_texts_are_tokenised_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = texts.tokenizer()
    document = "the cat sat\n" * 50
    whole, _ = token_windows([document], tokenizer, length=10)
    monkeypatch.setattr(text, "_PIECE", 30)
    pieces, _ = token_windows([document], tokenizer, length=10)
    assert torch.equal(pieces, whole)
