"""GGUF files, read as untrusted: every count is compared with the size of the file before it is used.

The format is described in ggml's docs/gguf.md. Sizes of quantised blocks and their unpacking are the gguf library's.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import RegroupError
from ..extras import require
from ..files import regular
from ..safe_text import command

if TYPE_CHECKING:
    import torch

_MAGIC = b"GGUF"
_STRING, _ARRAY, _BOOL = 8, 9, 7
# Types of values by their number in a file: how struct spells them.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_STRINGS = 2**24  # in one list; Python takes several times the bytes that they take in the file
_MAX_KEYS, _MAX_TENSORS = 2**16, 2**20
_MAX_ALIGNMENT = 2**20
_PLAIN = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        name: in the file.
        shape: as torch has it, the dimension that lies together last.
        kind: ggml's name for how it is stored, such as ``"F16"`` or ``"Q4_K"``.
        offset, nbytes: where it lies, from the beginning of the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int

    @property
    def parameters(self) -> int:
        """How many weights."""
        return int(np.prod([1, *self.shape], dtype=object))


@dataclass(frozen=True)
class GGUFFile:
    """What a GGUF file says and where its tensors lie.

    Attributes:
        path: the file.
        values: its metadata by key: numbers, strings, lists of strings, and arrays of numbers as numpy's.
        tensors: by name.
        order: of bytes, ``"<"`` or ``">"``.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    order: str = "<"

    @property
    def parameters(self) -> int:
        """How many weights there are in the file."""
        return sum(tensor.parameters for tensor in self.tensors.values())

    @property
    def architecture(self) -> str:
        """llama.cpp's name of the architecture.

        Raises:
            RegroupError: the file names none.
        """
        found = self.values.get("general.architecture")
        if not isinstance(found, str):
            raise self._impossible("general.architecture", "a name", found)
        return found

    def numbers(self, key: str, default: Any = None, *, least: int = 0, most: int = 2**31 - 1) -> int | list[int]:
        """A whole number of the architecture, or a list with one per layer.

        Raises:
            RegroupError: it is missing, not whole or out of range.
        """
        value = self.values.get(f"{self.architecture}.{key}", default)
        value = value.tolist() if isinstance(value, np.ndarray) else value
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(type(number) is int and least <= number <= most for number in listed):
            raise self.impossible(key, f"a whole number from {least} to {most}", value)
        return value

    def number(self, key: str, default: Any = None, *, least: int = 0, most: int = 2**31 - 1) -> int:
        """A whole number of the architecture that holds for all layers; see ``numbers``."""
        value = self.numbers(key, default, least=least, most=most)
        if isinstance(value, list):
            raise self.impossible(key, "one number for all layers", value)
        return value

    def impossible(self, key: str, expected: object, got: object) -> RegroupError:
        """The error for a value of the architecture that is missing or impossible."""
        return self._impossible(f"{self.architecture}.{key}", expected, got)

    def _impossible(self, key: str, expected: object, got: object) -> RegroupError:
        return RegroupError(
            "the GGUF header lacks a value that is needed, or has an impossible one",
            file=self.path,
            expected=f"{key}: {expected}",
            got=str(got)[:80],
        )

    def dtype_of(self, name: str) -> torch.dtype | None:
        """The dtype of a tensor; None where it is quantised."""
        from .dtypes import TORCH_DTYPES

        kind = self.tensors[name].kind
        return TORCH_DTYPES[kind] if kind in _PLAIN else None

    def read(self, name: str) -> torch.Tensor:
        """A tensor in the dtype that it is stored in; what is quantised is unpacked to float32.

        Raises:
            RegroupError: the library does not unpack tensors of this kind.
        """
        require("gguf", "gguf")
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        tensor = self.tensors[name]
        with self.path.open("rb") as file:
            file.seek(tensor.offset)
            raw = bytearray(file.read(tensor.nbytes))
        if len(raw) != tensor.nbytes:
            raise RegroupError("the GGUF file is shorter than its header says", file=self.path, tensor=name)
        if (dtype := self.dtype_of(name)) is not None:
            return torch.frombuffer(raw, dtype=dtype).view(tensor.shape)
        try:
            rows = np.frombuffer(raw, dtype=np.uint8).reshape(*tensor.shape[:-1], -1)
            values = dequantize(rows, GGMLQuantizationType[tensor.kind])
        except NotImplementedError as error:
            raise RegroupError(
                "tensors of this type cannot be dequantised",
                file=self.path,
                tensor=name,
                got=tensor.kind,
                remedy="start from the checkpoint that the file was made of, or from another GGUF file of it",
            ) from error
        return torch.from_numpy(np.ascontiguousarray(values)).view(tensor.shape)


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, by its name or by how it begins; a folder or hub id is none."""
    if path.is_dir() or not path.exists():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        with path.open("rb") if path.is_file() else contextlib.nullcontext() as file:
            return file is not None and file.read(4) == _MAGIC
    except OSError:
        return False


def refuse_gguf(path: Path) -> None:
    """Where a folder is wanted, say how one is made of a GGUF file.

    Raises:
        RegroupError: the path is one.
    """
    if is_gguf(path):
        folder = path.parent / f"{path.stem}-hf"
        raise RegroupError(
            "this is a GGUF file, and checkpoint folders are read here",
            file=path,
            expected="a checkpoint folder or a hub id",
            remedy=f"make a folder of it and give that one: {command('export', path, folder, to='hf')}",
        )


def read_gguf(path: Path) -> GGUFFile:
    """Read and check the header of a GGUF file; no weight is read.

    Raises:
        RegroupError: missing, no regular file, no GGUF, damaged, cut short, or one part of several.
    """
    try:
        status = regular(path)
        with path.open("rb") as file:
            if status.st_size < 24 or file.read(4) != _MAGIC:
                raise RegroupError(
                    "this is not a GGUF file, or it is truncated", file=path, expected="a file with a header"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                found = _Header(path, data).read()
    except OSError as error:
        raise RegroupError("this GGUF file cannot be read", file=path, got=error.strerror or str(error)) from error
    parts = found.values.get("split.count", 0)
    if isinstance(parts, int) and parts > 1:
        raise RegroupError(
            "this GGUF file is one part of several",
            file=path,
            expected="the whole model in one file",
            got=f"part {int(found.values.get('split.no', 0)) + 1} of {parts}",
            remedy="join the parts with llama.cpp's llama-gguf-split --merge",
        )
    return found


class _Header:
    """A cursor over the header. Nothing is allocated for what the file cannot hold."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.position, self.order = path, data, 4, "<"

    def read(self) -> GGUFFile:
        version = self.number("I")
        if version & 0xFFFF == 0:  # a small number read backwards
            self.order, self.position = ">", 4
            version = self.number("I")
        if version not in (2, 3):
            raise self.damaged("an unknown version of the format", "2 or 3", version)
        tensors, keys = self.number("Q"), self.number("Q")
        # A tensor takes at least 24 bytes of the header, a key 13.
        self.check_count("tensors", tensors, 24, _MAX_TENSORS)
        self.check_count("keys", keys, 13, _MAX_KEYS)
        values: dict[str, Any] = {}
        for _ in range(keys):
            key = self.string()
            if key in values:
                raise self.damaged("a key twice", "each key once", key)
            values[key] = self.value(self.number("I"), key)
        infos = list(self.infos(tensors))
        alignment = values.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self.damaged("an impossible general.alignment", "a power of two", alignment)
        start = -(-self.position // alignment) * alignment
        return GGUFFile(self.path, values, self.placed(infos, start, alignment), self.order)

    def infos(self, count: int) -> Iterator[tuple[str, tuple[int, ...], int, int]]:
        """Name, shape, kind and offset of each tensor."""
        for _ in range(count):
            name = self.string()
            dimensions = self.number("I")
            if not 1 <= dimensions <= 4:
                raise self.damaged(f"an impossible shape of {name[:100]}", "1 to 4 dimensions", dimensions)
            shape = tuple(self.number("Q") for _ in range(dimensions))
            yield name, shape[::-1], self.number("I"), self.number("Q")

    def placed(
        self, infos: list[tuple[str, tuple[int, ...], int, int]], start: int, alignment: int
    ) -> dict[str, GGUFTensor]:
        found: dict[str, GGUFTensor] = {}
        size, end, last = len(self.data), 0, ""
        for name, shape, number, offset in sorted(infos, key=lambda info: info[3]):
            if name in found:
                raise self.damaged("a tensor twice", "each name once", name)
            kind, block, nbytes = self.kind(number, name)
            if 0 in shape or shape[-1] % block:
                raise self.damaged(f"an impossible shape of {name[:100]}", f"rows of {kind} blocks of {block}", shape)
            nbytes *= int(np.prod(shape, dtype=object)) // block
            if offset % alignment or offset < end:
                raise self.damaged(f"{name[:100]} in an impossible place", f"a place of its own after {last}", offset)
            if start + offset + nbytes > size:
                raise RegroupError(
                    "the GGUF file is shorter than its header says",
                    file=self.path,
                    tensor=name,
                    expected=f"{start + offset + nbytes} bytes",
                    got=f"{size} bytes",
                    remedy="download it again",
                )
            found[name] = GGUFTensor(name, shape, kind, start + offset, nbytes)
            end, last = offset + nbytes, name[:100]
        return {name: found[name] for name, *_ in infos}

    def kind(self, number: int, name: str) -> tuple[str, int, int]:
        """Name, elements and bytes of a block of ggml's type of this number."""
        kinds = _kinds()
        if number not in kinds:
            raise RegroupError(
                "the installed gguf library does not know how this tensor is stored",
                file=self.path,
                tensor=name,
                got=f"ggml type {number}",
                remedy="upgrade gguf, if the file is not damaged",
            )
        return kinds[number]

    def value(self, kind: int, key: str, depth: int = 0) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind], key)
        if kind == _STRING:
            return self.string(key)
        if kind != _ARRAY or depth > 2:
            raise self.damaged(f"an unknown type of value of {key[:100]}", "a number, string or list", kind)
        inner, count = self.number("I"), self.number("Q")
        if inner not in _NUMBERS:
            self.check_count(f"values of {key[:100]}", count, 8, _MAX_STRINGS)
            return [self.value(inner, key, depth + 1) for _ in range(count)]
        width = struct.calcsize(_NUMBERS[inner])
        self.check_count(f"values of {key[:100]}", count, width, 2**40)
        order: Any = self.order
        raw = np.frombuffer(self.take(count * width), dtype=np.dtype(_NUMBERS[inner]).newbyteorder(order))
        if inner == _BOOL and bool((raw.view(np.uint8) > 1).any()):
            raise self.damaged(f"a value of {key[:100]}", "0 or 1", "another byte")
        return raw

    def number(self, letter: str, key: str = "") -> Any:
        raw = self.take(struct.calcsize(self.order + letter))
        if letter == "?" and raw not in (b"\0", b"\1"):
            raise self.damaged(f"the value of {key[:100]}", "0 or 1", raw[0])
        return struct.unpack(self.order + letter, raw)[0]

    def string(self, key: str = "") -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            where = f" in {key[:100]}" if key else ""
            raise self.damaged(f"text that is not UTF-8{where}", "UTF-8", repr(raw[:60])) from error

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise self.damaged("more than the file holds", f"{end} bytes", f"{len(self.data)} bytes")
        self.position, start = end, self.position
        return self.data[start:end]

    def check_count(self, what: str, count: int, least: int, most: int) -> None:
        limit = min(most, (len(self.data) - self.position) // least)
        if count > limit:
            raise self.damaged(f"more {what} than the file holds", f"at most {limit}", count)

    def damaged(self, what: str, expected: object, got: object) -> RegroupError:
        return RegroupError(
            f"this GGUF file is damaged: its header has {what}",
            file=self.path,
            expected=expected,
            got=got if isinstance(got, int) else str(got)[:200],
            remedy="download or create it again",
        )


@functools.cache
def _kinds() -> dict[int, tuple[str, int, int]]:
    require("gguf", "gguf")
    from gguf import GGML_QUANT_SIZES

    return {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
