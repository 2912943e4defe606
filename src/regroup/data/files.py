"""Files of text, of JSON lines and of tab-separated pairs, plain or gzipped."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import regular
from .chunking import CHUNK_BYTES, Chunk, columns

JSON_LINES = (".jsonl", ".json")
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class TextFile:
    """A text file: one document, in pieces that end at line ends, so that hardly a token is cut.

    ``raw`` is what was in it, where it is a pipe that was read.
    """

    path: Path
    raw: bytes | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return self.path.name

    def nbytes(self) -> int | None:
        return _file_bytes(self.path, self.raw)

    def chunks(self, position: int | None = None) -> Iterator[Chunk]:
        """Positions are byte offsets, of the text where it is gzipped."""
        with _reading(self.path, self.raw) as file:
            offset = position or 0
            file.seek(offset)
            block = file.read(CHUNK_BYTES)
            while block:
                after = file.read(1)
                size = len(block) if not after else _last_border(block)
                text = _decoded(block[:size], self.path, offset)
                rest = block[size:] + after
                ahead = file.read(CHUNK_BYTES - len(rest)) if after else b""
                yield Chunk(offset, [text], size, begins=offset == 0, ends=not rest)
                offset += size
                block = rest + ahead


def _last_border(block: bytes) -> int:
    """After the last line of a block, or before the last character, which may continue beyond it."""
    border = block.rfind(b"\n") + 1
    if border:
        return border
    border = len(block) - 1
    while border > 0 and block[border] & 0xC0 == 0x80:
        border -= 1
    return border or len(block)


@dataclass(frozen=True)
class LineFile:
    """JSON lines with ``text``, or ``source`` and ``target``; or tab-separated pairs.

    Where it is a pipe that was read, ``raw`` is what was in it, and ``as_json`` says which of the two.
    """

    path: Path
    pairs: bool
    raw: bytes | None = field(default=None, repr=False)
    as_json: bool | None = None

    @property
    def name(self) -> str:
        return self.path.name

    def nbytes(self) -> int | None:
        return _file_bytes(self.path, self.raw)

    def chunks(self, position: list[int] | None = None) -> Iterator[Chunk]:
        """Positions are byte offset and number of the line, counted from 0."""
        as_json = suffix_of(self.path) in JSON_LINES if self.as_json is None else self.as_json
        with _reading(self.path, self.raw) as file:
            offset, number = position or (0, 0)
            file.seek(offset)
            start, rows = [offset, number], []
            while line := file.readline():
                offset, number = offset + len(line), number + 1
                text = _decoded(line, self.path, offset - len(line)).removesuffix("\n").removesuffix("\r")
                where = f"{self.path}:{number}"
                if not as_json:
                    rows.append(_tab_separated(text, where))
                elif text.strip():
                    rows.append(columns(_json(text, where), self.pairs, where))
                if offset - start[0] >= CHUNK_BYTES:
                    yield Chunk(start, rows, offset - start[0])
                    start, rows = [offset, number], []
            if rows:
                yield Chunk(start, rows, offset - start[0])


def _tab_separated(line: str, where: str) -> tuple[str, str]:
    sides = line.split("\t")
    if len(sides) != 2:
        raise RegroupError("a line is not a pair", file=where, expected="source, tab, target", got=line[:120])
    return sides[0], sides[1]


def _json(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RegroupError("a line is not valid JSON", file=where, got=str(error)[:120]) from error


def suffix_of(path: Path) -> str:
    """The suffix, before .gz where that is the last one."""
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def is_json(raw: bytes, path: Path) -> bool:
    """Whether what came through a pipe begins with a line that is a JSON object."""
    with _reading(path, raw) as file:
        first = file.readline(CHUNK_BYTES)
        while first and not first.strip():
            first = file.readline(CHUNK_BYTES)
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _file_bytes(path: Path, raw: bytes | None) -> int | None:
    """Of the text; not known beforehand where it is gzipped."""
    if raw is not None:
        return None if raw.startswith(_GZIP) else len(raw)
    return None if path.suffix == ".gz" else path.stat().st_size


@contextmanager
def _reading(path: Path, raw: bytes | None) -> Iterator[Any]:
    packed = path.suffix == ".gz" if raw is None else raw.startswith(_GZIP)
    held: Any = path if raw is None else io.BytesIO(raw)
    try:
        if raw is None:
            regular(path)
        with gzip.open(held, "rb") if packed else path.open("rb") if raw is None else held as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:
        raise RegroupError("the data cannot be read", file=path, got=str(error)[:200]) from error


def _decoded(raw: bytes, path: Path, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise RegroupError(
            "the text is not UTF-8", file=path, got=f"byte {offset + error.start}: {error.reason}"
        ) from error
