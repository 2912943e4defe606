"""The safetensors header: what tensors a file holds and at which bytes.

Format: https://github.com/huggingface/safetensors#format. Eight bytes of little-endian length, that many bytes of JSON,
then the data. The library's own reader maps the file and hides the offsets; both stand in the way of copying untouched
byte ranges without loading them, so the header is read here, with every check that keeps a bad file from belief.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import parse_json, regular

# The limit that the safetensors library itself enforces.
MAX_HEADER_BYTES = 100_000_000
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
# What torch can hold.
MAX_DIMENSIONS = 64

_damaged = partial(RegroupError, remedy="the file is damaged: download or save it again")

# Bits per element of every dtype that the format knows.
DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8,
    "BOOL": 8, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file.

    Attributes:
        dtype: the format's own name, such as ``"BF16"``.
        shape: as stored.
        start, end: byte range, counted from the beginning of the file.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


def nbytes_of(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor of this safetensors dtype and shape."""
    return (math.prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check the header of one safetensors file.

    Returns:
        The tensors in the order of their data, and the file's free-form metadata.

    Raises:
        RegroupError: the file is missing, truncated, or its header contradicts itself.
    """
    refuse_pointer(path)
    with unreadable(path):
        size = regular(path).st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8 or length > min(MAX_HEADER_BYTES, size - 8):
                raise _not_safetensors(path, f"a header of {length} bytes in a file of {size} bytes")
            raw = file.read(length)
    try:
        header = parse_json(raw, strict=True, whole=_whole)
    except (ValueError, RecursionError) as error:
        raise _not_safetensors(path, f"a header that is not JSON ({type(error).__name__})") from error
    if not isinstance(header, dict):
        raise _not_safetensors(path, "a header that is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not (isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())):
        raise _not_safetensors(path, "metadata that is not a table of strings")

    entries = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    position = 8 + length
    for name, entry in ordered.items():
        if entry.start != position:
            raise _damaged(
                "the tensors of a safetensors file overlap or leave a gap",
                file=path,
                tensor=name,
                expected=f"data from byte {position}",
                got=f"data from byte {entry.start}",
            )
        position = entry.end
    if position != size:
        raise RegroupError(
            "a safetensors file is truncated" if position > size else "a safetensors file has trailing bytes",
            file=path,
            expected=f"{position} bytes",
            got=f"{size} bytes",
            remedy="download the file again",
        )
    return ordered, metadata


def refuse_pointer(path: Path) -> None:
    """Refuse a Git LFS pointer, the three lines of text that a clone without Git LFS leaves in a file's place.

    Raises:
        RegroupError: it is one; or the file cannot be read.
    """
    with unreadable(path):
        if not path.is_file():  # reading it may wait for ever
            raise OSError(errno.EINVAL, "not a regular file")
        with path.open("rb") as file:
            beginning = file.read(len(_LFS_POINTER))
    if beginning == _LFS_POINTER:
        raise RegroupError(
            "this is a Git LFS pointer, not the file that it stands for",
            file=path,
            expected="the file itself",
            got=f"{path.stat().st_size} bytes of text that name it",
            remedy="run `git lfs pull` in the folder (after `git lfs install`), or download the file from the hub",
        )


def missing_shard(path: Path) -> RegroupError:
    """The refusal of a checkpoint whose index names a file that is not there."""
    return RegroupError(
        "a shard of the checkpoint is missing",
        file=path,
        expected="every file that the index names",
        got=f"no file {path.name} in the folder",
        remedy="download the missing file again, or correct the index",
    )


@contextlib.contextmanager
def unreadable(path: Path, tensor: str | None = None) -> Iterator[None]:
    """Say which file (and tensor) the system refused to read within the block."""
    try:
        yield
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        absent = getattr(error, "errno", None) == errno.ENOENT
        raise RegroupError(
            "a checkpoint file cannot be read",
            file=repr(str(path)) if isinstance(error, ValueError) else path,
            tensor=tensor,
            got=getattr(error, "strerror", None) or str(error),
            remedy="download the missing file again or correct the index"
            if absent
            else "see whether the file may be read and its disk is sound, or download it again",
        ) from error


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length prefix and header of a file that holds these tensors (name to dtype and shape) in this order."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + nbytes_of(dtype, shape)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    body = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    body += b" " * (-len(body) % 8)  # the format asks for data aligned to 8 bytes
    return len(body).to_bytes(8, "little") + body


def _entry(path: Path, name: str, value: object, data_start: int) -> TensorEntry:
    def natural(item: object) -> bool:
        return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**63

    if isinstance(value, dict):
        dtype, shape, offsets = value.get("dtype"), value.get("shape"), value.get("data_offsets")
        if (
            isinstance(dtype, str)
            and isinstance(shape, list)
            and len(shape) <= MAX_DIMENSIONS
            and all(map(natural, shape))
            and isinstance(offsets, list)
            and len(offsets) == 2
            and all(map(natural, offsets))
        ):
            if dtype not in DTYPE_BITS:
                raise RegroupError(
                    "a tensor has a dtype that the safetensors format does not define",
                    file=path,
                    tensor=name,
                    expected=", ".join(DTYPE_BITS),
                    got=dtype,
                )
            expected = nbytes_of(dtype, tuple(shape))
            if offsets[1] - offsets[0] != expected:
                raise _damaged(
                    "a tensor's byte range does not fit its shape",
                    file=path,
                    tensor=name,
                    expected=f"{expected} bytes for {dtype} {shape}",
                    got=f"{offsets[1] - offsets[0]} bytes",
                )
            return TensorEntry(dtype, tuple(shape), data_start + offsets[0], data_start + offsets[1])
    raise RegroupError(
        "a safetensors header entry is malformed",
        file=path,
        tensor=name,
        expected="dtype, shape and data_offsets",
        got=str(value)[:120],
    )


def _whole(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number to the safetensors library")
    return int(text)


def _not_safetensors(path: Path, got: str) -> RegroupError:
    return RegroupError(
        "this is not a complete safetensors file",
        file=path,
        expected="8 bytes of header length, a JSON header, then the data",
        got=got,
        remedy="download the file again",
    )
