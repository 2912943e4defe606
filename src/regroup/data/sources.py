"""Where documents come from: files, folders of them and data sets, by the names that users give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..errors import RegroupError
from .chunking import Source
from .files import JSON_LINES, LineFile, TextFile, suffix_of
from .tables import DataSet, ParquetFile

_KNOWN = (".txt", *JSON_LINES, ".tsv", ".parquet")


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
            files = sorted(file for file in path.rglob("*") if file.is_file() and suffix_of(file) in _KNOWN)
            if not files:
                raise RegroupError("the folder holds no data", file=path, expected="files of " + ", ".join(_KNOWN))
            found += [_file(file, pairs) for file in files]
        elif path.is_file():
            found.append(_file(path, pairs))
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
    suffix = suffix_of(path)
    if path.stat().st_size == 0:
        raise RegroupError("the data is empty", file=path, got="0 bytes")
    if suffix == ".parquet":
        return ParquetFile(path, pairs)
    if suffix in JSON_LINES or pairs:
        return LineFile(path, pairs)
    return TextFile(path)
