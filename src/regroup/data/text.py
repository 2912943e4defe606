"""Reading text, JSON lines and pairs, and cutting text into windows of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ..errors import RegroupError
from .sources import find_sources

# Tokenising book-sized strings at once takes memory out of all proportion; pieces of this many characters do not.
_PIECE = 1 << 20


def read_texts(name: str | Path) -> Iterator[str]:
    """Documents: the whole of a text file, the ``"text"`` of each JSON line or parquet row, or a data set's.

    Args:
        name: a file, pipe or folder (see ``sources.find_sources``), or a data set of the hub such as
            ``hf:allenai/c4:en``.

    Raises:
        RegroupError: missing, not UTF-8, empty, or a row without text.
    """
    empty = True
    for source in find_sources([str(name)], pairs=False, once=True):
        pieces: list[str] = []
        for chunk in source.chunks():
            for number, document in enumerate(chunk.documents):
                pieces.append(document)
                if number + 1 < len(chunk.documents) or chunk.ends:
                    text, pieces = "".join(pieces), []
                    empty = empty and not text.strip()
                    yield text
    if empty:
        raise RegroupError("the data holds no text", file=name, remedy="give a file with text")


def read_pairs(name: str | Path) -> Iterator[tuple[str, str]]:
    """Source and target of each row: tab-separated lines, or JSON lines, parquet or a data set with these columns.

    Args and errors as ``read_texts``.
    """
    empty = True
    for source in find_sources([str(name)], pairs=True, once=True):
        for chunk in source.chunks():
            empty = False
            yield from chunk.documents
    if empty:
        raise RegroupError("the data holds no pairs", file=name, remedy="give a file with pairs of text")


def check_window(config: Mapping[str, Any], window: int, *, option: str = "--window") -> None:
    """Refuse windows that are longer than the model's positions.

    Args:
        config: of the model.
        window: tokens per window.
        option: of the command line that says so.

    Raises:
        RegroupError: naming the option and the longest window that it may ask for.
    """
    limit = longest_window(config)
    if limit is not None and limit < window:
        raise RegroupError(
            "the windows are longer than the model's positions",
            expected=f"at most {limit} tokens",
            got=window,
            remedy=f"pass {option} {limit}",
        )


def longest_window(config: Mapping[str, Any]) -> int | None:
    """Positions of a model, as its config says; None where it does not."""
    named = (config.get(name) for name in ("max_position_embeddings", "n_positions"))
    limits = [limit for limit in named if isinstance(limit, int) and limit > 0]
    return min(limits, default=None)


def token_windows(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    length: int,
    limit: int | None = None,
    bos: bool = True,
    document_starts: bool = False,
    file: object = None,
    option: str = "--window",
) -> tuple[torch.Tensor, int]:
    """Cut text into windows of tokens that do not overlap; what is left over at the end is dropped.

    Args:
        texts: documents; they are joined, with the tokenizer's end-of-sequence token between them.
        tokenizer: a transformers tokenizer.
        length: tokens per window.
        limit: number of windows at most.
        bos: begin every window with the tokenizer's beginning-of-sequence token, where it has one: a model that was
            trained to see it first is otherwise surprised by every window's start.
        document_starts: take one window from the start of each document that is long enough, instead of joining them.
        file: where the texts come from, and
        option: what the command line calls the length, both for the message.

    Returns:
        (windows, length) int64, and the bytes of UTF-8 text that a model predicts in them: a window's first token is
        given, not predicted, and special tokens hold no text.

    Raises:
        RegroupError: less text than one window, or special tokens alone.
    """
    first = [tokenizer.bos_token_id] if bos and tokenizer.bos_token_id is not None else []
    body = length - len(first)
    rows: list[list[int]] = []
    nbytes = 0
    if document_starts:
        starts = (list(islice(_tokens([text], tokenizer), body)) for text in texts)
        chunks = (chunk for chunk in starts if len(chunk) == body)
    else:
        chunks = _chunks(_tokens(texts, tokenizer), body)
    for chunk in chunks:
        rows.append(first + chunk)
        nbytes += _text_bytes(rows[-1][1:], tokenizer)
        if limit is not None and len(rows) == limit:
            break
    if not rows:
        raise RegroupError(
            "there is less text than one window",
            file=file,
            expected=f"at least {length} tokens",
            remedy=f"use a shorter {option}",
        )
    _check_text(rows, tokenizer, file)
    return torch.tensor(rows, dtype=torch.int64), nbytes


def document_windows(
    texts: Iterable[str],
    tokenizer: Any,
    *,
    length: int,
    limit: int,
    file: object = None,
    option: str = "--window",
) -> torch.Tensor:
    """Windows that never hold two documents: the first one of each document, then the second ones, and so on.

    Every window begins with the tokenizer's beginning-of-sequence token where it has one. What does not fill a window
    is left out.

    Args:
        texts: documents; as many are read as it takes to find ``limit`` first windows.
        tokenizer: a transformers tokenizer.
        length: tokens per window.
        limit: number of windows at most.
        file, option: for the message, as in ``token_windows``.

    Returns:
        (windows, length) int64.

    Raises:
        RegroupError: no document is as long as a window, or there are special tokens alone.
    """
    first = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    body = length - len(first)
    documents: list[list[int]] = []
    for text in texts:
        tokens = list(islice(_tokens([text], tokenizer), body * limit))
        if len(tokens) >= body:
            documents.append(tokens)
        if len(documents) == limit:
            break
    if not documents:
        raise RegroupError(
            "no document is as long as a window",
            file=file,
            expected=f"at least {length} tokens",
            remedy=f"use a shorter {option}, or join documents",
        )
    rows: list[list[int]] = []
    start = 0
    while len(rows) < limit and documents:
        rows += [first + tokens[start : start + body] for tokens in documents]
        start += body
        documents = [tokens for tokens in documents if len(tokens) >= start + body]
    _check_text(rows[:limit], tokenizer, file)
    return torch.tensor(rows[:limit], dtype=torch.int64)


def _check_text(rows: Sequence[Sequence[int]], tokenizer: Any, file: object) -> None:
    """Refuse windows in which there is nothing to learn or to predict but special tokens."""
    if set().union(*rows) <= set(tokenizer.all_special_ids):
        raise RegroupError(
            "the data holds special tokens alone",
            file=file,
            expected="text",
            got="tokens such as " + ", ".join(tokenizer.convert_ids_to_tokens(sorted(set(rows[0]))[:3])),
            remedy="give text of the kind that the model was trained on; it may be in letters that its tokenizer lacks",
        )


def _text_bytes(tokens: list[int], tokenizer: Any) -> int:
    """Bytes of UTF-8 text that the tokens stand for."""
    special = set(tokenizer.all_special_ids)
    plain = [token for token in tokens if token not in special]

    def decoded(ids: list[int]) -> int:
        return len(tokenizer.decode(ids, clean_up_tokenization_spaces=False).encode())

    # Many tokenizers drop a space at the start of what they decode; the doubled first token takes that loss.
    return decoded(plain[:1] + plain) - decoded(plain[:1])


def _tokens(texts: Iterable[str], tokenizer: Any) -> Iterator[int]:
    for number, text in enumerate(texts):
        if number and tokenizer.eos_token_id is not None:
            yield tokenizer.eos_token_id
        for start, end in pieces_of(text):
            yield from tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]


def pieces_of(text: str) -> Iterator[tuple[int, int]]:
    """Ranges of a text that end at line ends, so that hardly a token is cut."""
    start = 0
    while start < len(text):
        end = min(start + _PIECE, len(text))
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield start, end
        start = end


def _chunks(tokens: Iterator[int], size: int) -> Iterator[list[int]]:
    chunk: list[int] = []
    for token in tokens:
        chunk.append(token)
        if len(chunk) == size:
            yield chunk
            chunk = []
