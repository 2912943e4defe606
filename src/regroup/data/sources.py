"""Where documents come from: files, folders of them and data sets, by the names that users give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import RegroupError
from ..files import as_named, kind_of, read_once
from .chunking import Source
from .files import JSON_LINES, LineFile, TextFile, is_json, suffix_of
from .tables import DataSet, ParquetFile

# What a pipe may hold, in bytes: it is kept in memory.
_MOST_PIPED = 1 << 30
_KNOWN = (".txt", *JSON_LINES, ".tsv", ".parquet")


def find_sources(names: Sequence[str], *, pairs: bool, once: bool = False) -> list[Source]:
    """The sources behind names: files, folders of them, or data sets (``hf:owner/name``), in the order they are read.

    Args:
        names: as users give them.
        pairs: whether the documents are pairs.
        once: what is found is read a single time, so that a pipe will do (``/dev/stdin``, a shell's ``<(…)``). Having
            no suffix, it holds JSON lines if its first line is one, and may be gzipped.

    Raises:
        RegroupError: one is missing, empty or of a kind that is not known.
    """
    found: list[Source] = []
    for name in names:
        path = as_named(name)
        try:
            kind = kind_of(path)
        except OSError as error:
            raise RegroupError("the data cannot be read", file=path, got=error.strerror) from error
        if name.startswith("hf:"):
            found.append(DataSet(name.removeprefix("hf:"), pairs))
        elif kind == "a folder":
            files = sorted(file for file in path.rglob("*") if suffix_of(file) in _KNOWN and not file.is_dir())
            if not files:
                raise RegroupError("the folder holds no data", file=path, expected="files of " + ", ".join(_KNOWN))
            found += [_file(file, pairs) for file in files]
        elif kind != "nothing":
            found.append(_piped(path, pairs) if kind == "a pipe" and once else _file(path, pairs))
        elif name.count("/") == 1 and name[0] not in "./~" and suffix_of(path) not in _KNOWN:
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
    suffix, kind = suffix_of(path), kind_of(path)
    if kind != "a file":
        raise RegroupError(
            "the data is not a file",
            file=path,
            expected="a file, or a folder of files",
            got=f"{kind}, which can be read once" if kind == "a pipe" else kind,
            remedy="save what it gives as a file first" if kind in ("a pipe", "a device") else None,
        )
    if path.stat().st_size == 0:
        raise RegroupError("the data is empty", file=path, got="0 bytes")
    if suffix == ".parquet":
        return ParquetFile(path, pairs)
    if suffix in JSON_LINES or pairs:
        return LineFile(path, pairs)
    return TextFile(path)


def _piped(path: Path, pairs: bool) -> Source:
    try:
        raw = read_once(path, _MOST_PIPED)
    except OSError as error:
        raise RegroupError(
            "the data cannot be read", file=path, got=error.strerror or str(error), remedy="give a file"
        ) from error
    if not raw.strip():
        raise RegroupError("the data is empty", file=path, got=f"a pipe of {len(raw)} bytes")
    as_json = is_json(raw, path)
    return LineFile(path, pairs, raw, as_json) if pairs or as_json else TextFile(path, raw)
