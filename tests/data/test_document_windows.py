"""Windows that never hold two documents, against plain loops."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import texts
from regroup import RegroupError
from regroup.data import document_windows, token_windows

DOCUMENTS = [
    "the cat sat on the mat",
    "cat",
    "naïve café: 步步 🙂 " * 3,
    "",
    "42 cats or the hat is flat; " * 4,
    "flat mats",
    "the hat",
]


def naive(documents: list[str], tokenizer: Any, length: int, limit: int) -> list[list[int]]:
    """Cut every document on its own, then deal the pieces out in rounds."""
    begin = [1] if tokenizer.bos_token_id is not None else []
    body = length - len(begin)
    ids = [tokenizer(document, add_special_tokens=False)["input_ids"] for document in documents]
    cut = [[row[k * body : (k + 1) * body] for k in range(len(row) // body)] for row in ids]
    # No more documents are read than it takes for the first round to be full.
    long_enough = [pieces for pieces in cut if pieces][:limit]
    rounds = range(max((len(pieces) for pieces in long_enough), default=0))
    return [begin + pieces[k] for k in rounds for pieces in long_enough if k < len(pieces)][:limit]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 7, 1000])
@pytest.mark.parametrize("length", [2, 5, 6, 12])
@pytest.mark.parametrize("bos", [True, False])
def test_windows_by_plain_loops(bos: bool, length: int, limit: int) -> None:
    tokenizer = texts.tokenizer(bos=bos)
    windows = document_windows(DOCUMENTS, tokenizer, length=length, limit=limit)
    assert windows.dtype == torch.int64
    assert windows.tolist() == naive(DOCUMENTS, tokenizer, length, limit)
    assert windows.shape == (min(limit, len(naive(DOCUMENTS, tokenizer, length, 1000))), length)
    if bos:
        assert windows[:, 0].tolist() == [1] * len(windows)


def test_first_windows_come_first() -> None:
    """Breadth first: documents take turns, and one that has run out is passed over."""
    tokenizer = texts.tokenizer()
    first, second, third = ("the cat sat " * n for n in (4, 2, 6))

    def piece(document: str, number: int) -> list[int]:
        ids = tokenizer(document, add_special_tokens=False)["input_ids"]
        return [1, *ids[number * body : (number + 1) * body]]

    body = len(tokenizer("the cat sat the cat sat", add_special_tokens=False)["input_ids"])
    windows = document_windows([first, second, third], tokenizer, length=body + 1, limit=99).tolist()
    expected = [(first, 0), (second, 0), (third, 0), (first, 1), (third, 1), (third, 2)]
    whole = [(d, k) for d, k in expected if len(piece(d, k)) == body + 1]
    assert windows == [piece(d, k) for d, k in whole]
    assert len(windows) >= 5
    # Depth first would be another order.
    assert windows != [piece(d, k) for d in (first, second, third) for k in range(3) if len(piece(d, k)) == body + 1]


def test_no_window_holds_two_documents() -> None:
    """Joined text puts an end-of-sequence token and another document into a window; this does not."""
    tokenizer = texts.tokenizer()
    joined, _ = token_windows(DOCUMENTS, tokenizer, length=6)
    assert tokenizer.eos_token_id in joined.flatten().tolist()
    windows = document_windows(DOCUMENTS, tokenizer, length=6, limit=99)
    assert tokenizer.eos_token_id not in windows.flatten().tolist()
    for row in windows.tolist():
        assert any(tokenizer.decode(row[1:]) in document for document in DOCUMENTS)
    starts, _ = token_windows(DOCUMENTS, tokenizer, length=6, document_starts=True)
    assert windows[: len(starts)].tolist() == starts.tolist()


def test_documents_that_just_fit() -> None:
    tokenizer = texts.tokenizer()
    ids = tokenizer("the cat sat on the mat", add_special_tokens=False)["input_ids"]
    exact = document_windows(["the cat sat on the mat"], tokenizer, length=len(ids) + 1, limit=5)
    assert exact.tolist() == [[1, *ids]]
    with pytest.raises(RegroupError, match="no document is as long"):
        document_windows(["the cat sat on the mat"], tokenizer, length=len(ids) + 2, limit=5)


def test_no_more_is_read_than_needed() -> None:
    """A large data set is read until there are enough documents."""
    read: list[int] = []

    def endless() -> Iterator[str]:
        while True:
            read.append(len(read))
            yield "the cat sat on the mat" if len(read) % 2 else "a"

    windows = document_windows(endless(), texts.tokenizer(), length=5, limit=3)
    assert len(windows) == 3
    assert len(read) == 5


@pytest.mark.parametrize("documents", [[], [""], ["cat", "mat", "hat"] * 20])
def test_documents_that_are_too_short(documents: list[str]) -> None:
    """Short documents are never joined, however many there are."""
    words = r"no document is as long as a window[\s\S]*at least 30 tokens[\s\S]*remedy"
    with pytest.raises(RegroupError, match=words):
        document_windows(documents, texts.tokenizer(), length=30, limit=4)
    if len(documents) > 1:
        assert len(token_windows(documents, texts.tokenizer(), length=30)[0])
