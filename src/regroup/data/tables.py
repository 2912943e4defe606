"""Tables with a column ``text``, or ``source`` and ``target``: parquet files, and data sets of the hub."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..extras import require
from .chunking import CHUNK_BYTES, Chunk, columns, document_bytes


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
        require("train", "pyarrow")
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
                        document = columns(values, self.pairs, f"{self.path}: row {row} of row group {number + 1}")
                        rows.append(document)
                        size += document_bytes(document)
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
        require("train", "datasets")
        import datasets
        from datasets.exceptions import DatasetsError

        name, config, split = [*self.name.split(":"), "", ""][:3]
        try:
            rows: Any = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
            if position is not None:
                rows.load_state_dict(copy.deepcopy(position))
            start, documents, size = position, [], 0
            for row in rows:
                documents.append(columns(row, self.pairs, self.name))
                size += document_bytes(documents[-1])
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
