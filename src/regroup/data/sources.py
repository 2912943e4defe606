"""Where documents come from: files and data sets, read a chunk at a time, each chunk with the position it begins at.

Reading again from a position gives the same chunks, so that a position is all that a resumed run needs.
"""

from __future__ import annotations

import copy
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..errors import RegroupError

CHUNK_BYTES = 1 << 18

_LINES = (".jsonl", ".json", ".tsv")
_KNOWN = (".txt", *_LINES, ".parquet")


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
    def name(self) -> str: ...
    def chunks(self, position: Any = None) -> Iterator[Chunk]: ...
    def nbytes(self) -> int | None: ...


def find_sources(names: Sequence[str], *, pairs: bool) -> list[Source]:
    """The sources behind names: files, folders of them, or data sets (``hf:owner/name``), in the order they are read.

    Raises:
        RegroupError: one is missing, empty or of a kind that is not known.
    """
    found: list[Source] = []
    for name in names:
        path = Path(name).expanduser()
        if name.startswith("hf:"):
            found.append(DataSet(name.removeprefix("hf:"), pairs))
        elif path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and _suffix(file) in _KNOWN)
            if not files:
                raise RegroupError("the folder holds no data", file=path, expected="files of " + ", ".join(_KNOWN))
            found += [_file(file, pairs) for file in files]
        elif path.is_file():
            found.append(_file(path, pairs))
        elif name.count("/") == 1 and name[0] not in "./~" and _suffix(path) not in _KNOWN:
            found.append(DataSet(name, pairs))
        else:
            raise RegroupError(
                "the data cannot be read",
                file=path,
                expected="a file, a folder, or a data set of the hub such as hf:allenai/c4:en",
                got="no such file or folder",
            )
    if not found:
        raise RegroupError("no data was given", remedy="pass --data")
    return found


def _file(path: Path, pairs: bool) -> Source:
    suffix = _suffix(path)
    if path.stat().st_size == 0:
        raise RegroupError("the data is empty", file=path, got="0 bytes")
    if suffix == ".parquet":
        return ParquetFile(path, pairs)
    if suffix in _LINES[:2] or pairs:
        return LineFile(path, pairs)
    return TextFile(path)


@dataclass(frozen=True)
class TextFile:
    """A text file: one document, in pieces that end at line ends, so that hardly a token is cut."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def nbytes(self) -> int | None:
        return _file_bytes(self.path)

    def chunks(self, position: int | None = None) -> Iterator[Chunk]:
        """Positions are byte offsets, of the text where it is gzipped."""
        with _reading(self.path) as file:
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
    """After the last line of a block, or before the last character, which may go on beyond it."""
    border = block.rfind(b"\n") + 1
    if border:
        return border
    border = len(block) - 1
    while border > 0 and block[border] & 0xC0 == 0x80:
        border -= 1
    return border or len(block)


@dataclass(frozen=True)
class LineFile:
    """JSON lines with ``text``, or ``source`` and ``target``; or tab-separated pairs."""

    path: Path
    pairs: bool

    @property
    def name(self) -> str:
        return self.path.name

    def nbytes(self) -> int | None:
        return _file_bytes(self.path)

    def chunks(self, position: list[int] | None = None) -> Iterator[Chunk]:
        """Positions are byte offset and number of the line, counted from 0."""
        as_json = _suffix(self.path) in _LINES[:2]
        with _reading(self.path) as file:
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
                    rows.append(_columns(_json(text, where), self.pairs, where))
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


def _columns(row: Any, pairs: bool, where: str) -> Any:
    """The text of a row, or its source and target."""
    names = ("source", "target") if pairs else ("text",)
    values = tuple(row.get(name) if isinstance(row, dict) else None for name in names)
    if not all(isinstance(value, str) for value in values):
        raise RegroupError(
            "a row of the data does not hold what it should",
            file=where,
            expected=" and ".join(names) + ", each a string",
            got=str(row)[:120],
        )
    return values if pairs else values[0]


@dataclass(frozen=True)
class ParquetFile:
    """A parquet file with a column ``text``, or ``source`` and ``target``."""

    path: Path
    pairs: bool

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def _names(self) -> list[str]:
        return ["source", "target"] if self.pairs else ["text"]

    def nbytes(self) -> int | None:
        with self._open() as file:
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
            columns = [group.column(number) for group in groups for number in range(group.num_columns)]
            return sum(column.total_uncompressed_size for column in columns if column.path_in_schema in self._names)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        import pyarrow
        import pyarrow.parquet as parquet

        try:
            with parquet.ParquetFile(self.path) as file:
                missing = set(self._names) - set(file.schema_arrow.names)
                if missing:
                    raise RegroupError(
                        "the parquet file lacks a column",
                        file=self.path,
                        expected=", ".join(self._names),
                        got=", ".join(file.schema_arrow.names),
                    )
                yield file
        except (pyarrow.ArrowException, OSError) as error:
            raise RegroupError("the data cannot be read", file=self.path, got=str(error)[:200]) from error

    def chunks(self, position: list[int] | None = None) -> Iterator[Chunk]:
        """Positions are row group and row in it."""
        group, first = position or (0, 0)
        with self._open() as file:
            for number in range(group, file.num_row_groups):
                skipped = first if number == group else 0
                start, rows, size, row = [number, skipped], [], 0, 0
                for batch in file.iter_batches(batch_size=256, row_groups=[number], columns=self._names):
                    for values in batch.to_pylist():
                        row += 1
                        if row <= skipped:
                            continue
                        document = _columns(values, self.pairs, f"{self.path}: row {row} of row group {number + 1}")
                        rows.append(document)
                        size += _size(document)
                        if size >= CHUNK_BYTES:
                            yield Chunk(start, rows, size)
                            start, rows, size = [number, row], [], 0
                if rows:
                    yield Chunk(start, rows, size)


@dataclass(frozen=True)
class DataSet:
    """A data set of the hub, streamed: ``NAME``, ``NAME:CONFIG`` or ``NAME:CONFIG:SPLIT``; the split is ``train``."""

    name: str
    pairs: bool

    def nbytes(self) -> int | None:
        return None

    def chunks(self, position: Any = None) -> Iterator[Chunk]:
        """Positions are states of ``datasets.IterableDataset``."""
        import datasets
        from datasets.exceptions import DatasetsError

        name, config, split = [*self.name.split(":"), "", ""][:3]
        try:
            rows: Any = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            if position is not None:
                rows.load_state_dict(copy.deepcopy(position))
            start, documents, size = position, [], 0
            for row in rows:
                documents.append(_columns(row, self.pairs, self.name))
                size += _size(documents[-1])
                if size >= CHUNK_BYTES:
                    after = rows.state_dict()
                    yield Chunk(start, documents, size)
                    start, documents, size = after, [], 0
            if documents:
                yield Chunk(start, documents, size)
        except (OSError, ValueError, DatasetsError) as error:
            raise RegroupError(
                "the data set cannot be read",
                file=self.name,
                got=f"{type(error).__name__}: {str(error)[:300]}",
                remedy="check its name, configuration and split, and the network",
            ) from error


def _size(document: Any) -> int:
    sides = (document,) if isinstance(document, str) else document
    return sum(len(side.encode()) for side in sides)


def _suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


def _file_bytes(path: Path) -> int | None:
    """Of the text; not known beforehand where it is gzipped."""
    return None if path.suffix == ".gz" else path.stat().st_size


@contextmanager
def _reading(path: Path) -> Iterator[Any]:
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
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
