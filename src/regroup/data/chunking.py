"""A chunk of documents, and what is read in chunks.

Reading again from a position gives the same chunks, so that a position is all that a resumed run needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import RegroupError

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class Chunk:
    """Some documents that follow each other in a source.

    Attributes:
        position: where in the source they begin, as plain JSON.
        documents: texts, or (source, target) pairs.
        nbytes: that they take in the source, about.
        begins, ends: whether the first one is the beginning of a document, and the last one the end.
    """

    position: Any
    documents: list[Any]
    nbytes: int
    begins: bool = True
    ends: bool = True


class Source(Protocol):
    """One file or data set. ``position`` None stands for the beginning."""

    @property
    def name(self) -> str:
        """For messages, and for a run's record: no path."""
        ...

    def chunks(self, position: Any = None) -> Iterator[Chunk]:
        """All chunks from a position on.

        Raises:
            RegroupError: it cannot be read, or does not hold what it should.
        """
        ...

    def nbytes(self) -> int | None:
        """How large its documents are, in bytes; None where that is not known before they are read."""
        ...


def columns(row: Any, pairs: bool, where: str) -> Any:
    """The text of a row, or its source and target.

    Raises:
        RegroupError: the row, which is at ``where``, holds no such strings.
    """
    names = ("source", "target") if pairs else ("text",)
    values = tuple(row.get(name) if isinstance(row, dict) else None for name in names)
    if not all(isinstance(value, str) for value in values):
        raise RegroupError(
            "a row of the data does not hold what it should",
            file=where,
            expected=" and ".join(names) + ", each a string",
            got=str(row)[:120],
        )
    for name, value in zip(names, values, strict=True):
        try:
            str(value).encode()
        except UnicodeEncodeError as error:
            # JSON's escapes can spell halves of characters, which no tokenizer takes.
            raise RegroupError(
                "a row of the data holds text that is not Unicode",
                file=where,
                expected=f"{name}: text without lone surrogates",
                got=f"{error.object[error.start]!a} at character {error.start + 1}",
                remedy="correct the row, or leave it out",
            ) from error
    return values if pairs else values[0]


def document_bytes(document: Any) -> int:
    """Of a text or a pair, in UTF-8."""
    sides = (document,) if isinstance(document, str) else document
    return sum(len(side.encode()) for side in sides)
