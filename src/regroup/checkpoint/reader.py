"""A checkpoint folder: its config, the place of each tensor, and the files that are copied with the weights."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RegroupError, human_bytes
from ..files import parse_json, regular
from .companions import companion_files, refuse_special
from .forms import foreign_weights, refuse_adapter, refuse_other_forms
from .header import MAX_HEADER_BYTES, TensorEntry, missing_shard, read_header, refuse_pointer, unreadable

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_another_version = partial(
    RegroupError, remedy="the index belongs to another version of the weights: download both again"
)

# Bytes that are compared at a time.
_BLOCK = 8 << 20


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint folder: headers are read and checked, weights are not.

    Attributes:
        folder: where it lies.
        config: the parsed ``config.json``.
        shards: file name to tensor name to entry, in the order of the data.
        metadata: file name to the safetensors metadata of that file.
        index: the parsed index file, or None for a single file.
        stamps: file name to size in bytes and time of the last change in ns, from before its header was read.
    """

    folder: Path
    config: dict[str, Any]
    shards: Mapping[str, Mapping[str, TensorEntry]]
    metadata: Mapping[str, Mapping[str, str]]
    index: dict[str, Any] | None
    stamps: Mapping[str, tuple[int, int]]
    _file_of: dict[str, str] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_file_of", {n: file for file, names in self.shards.items() for n in names})

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """Every tensor of the checkpoint by name."""
        return {name: entry for shard in self.shards.values() for name, entry in shard.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of tensor data."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def file_of(self, tensor: str) -> str:
        return self._file_of[tensor]

    def read(self, tensor: str) -> torch.Tensor:
        """Read one tensor into memory, in the dtype that is stored.

        Raises:
            RegroupError: the dtype is not a floating-point type that can be merged, or the file has shrunk.
        """
        from .dtypes import TORCH_DTYPES

        file = self._file_of[tensor]
        entry = self.shards[file][tensor]
        if entry.dtype not in TORCH_DTYPES:
            raise RegroupError(
                "a tensor to be rewritten is not stored in floating point",
                file=self.folder / file,
                tensor=tensor,
                expected=", ".join(TORCH_DTYPES),
                got=entry.dtype,
                remedy="start from the unquantised checkpoint",
            )
        return self.read_bytes(tensor).view(TORCH_DTYPES[entry.dtype]).view(entry.shape)

    def read_bytes(self, tensor: str) -> torch.Tensor:
        """Read one tensor of any dtype as what is stored: its bytes, uint8 of shape (nbytes,).

        Raises:
            RegroupError: the file has shrunk, or memory does not hold the tensor.
        """
        file = self._file_of[tensor]
        entry = self.shards[file][tensor]
        buffer = _allocate(entry.nbytes, self.folder / file, tensor)
        view = buffer.numpy().data
        with unreadable(self.folder / file, tensor), (self.folder / file).open("rb", buffering=0) as stream:
            done = 0
            while done < entry.nbytes:
                count = os.preadv(stream.fileno(), [view[done:]], entry.start + done)
                if count == 0:
                    raise RegroupError(
                        "a checkpoint file became shorter while it was read",
                        file=self.folder / file,
                        tensor=tensor,
                        expected=f"{entry.end} bytes",
                        got=f"{entry.start + done} bytes",
                    )
                done += count
        return buffer

    def same(self, tensor: str, other: str) -> bool:
        """Whether two tensors hold the same numbers; those of another dtype are compared in float64."""
        one, two = self.tensors[tensor], self.tensors[other]
        if one.shape != two.shape:
            return False
        if one.dtype != two.dtype:
            return bool((self.read(tensor).double() == self.read(other).double()).all())
        paths = [self.folder / self.file_of(name) for name in (tensor, other)]
        with unreadable(paths[0], f"{tensor}, {other}"), paths[0].open("rb") as mine, paths[1].open("rb") as theirs:
            for done in range(0, one.nbytes, _BLOCK):
                count = min(_BLOCK, one.nbytes - done)
                mine.seek(one.start + done)
                theirs.seek(two.start + done)
                if mine.read(count) != theirs.read(count):
                    return False
        return True

    def check_unchanged(self, file: str) -> None:
        """Refuse what was read of a file that somebody has written to since the checkpoint was opened.

        Raises:
            RegroupError: its size or its time of change is another.
        """
        path = self.folder / file
        with unreadable(path):
            now = _stamp(path)
        if now != self.stamps[file]:
            raise RegroupError(
                "a checkpoint file changed while it was read",
                file=path,
                expected=f"{self.stamps[file][0]} bytes, and nobody who writes to it",
                got=f"{now[0]} bytes",
                remedy="wait until the checkpoint is complete, then run the command again",
            )

    def companions(self) -> Iterator[Path]:
        """The files that are copied to a converted model (see ``companion_files``)."""
        return companion_files(self.folder)


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON file that holds an object.

    Raises:
        RegroupError: missing, unreadable, or not a JSON object.
    """
    try:
        size = regular(path).st_size
        if size > MAX_HEADER_BYTES:
            raise RegroupError(
                "a JSON file of the checkpoint is larger than any that is known",
                file=path,
                expected=f"at most {MAX_HEADER_BYTES} bytes",
                got=f"{size} bytes",
                remedy="download the file again",
            )
        value = parse_json(path.read_bytes())
    except OSError as error:
        raise RegroupError(
            "a file of the checkpoint cannot be read", file=path, got=error.strerror or str(error)
        ) from error
    except (ValueError, RecursionError) as error:
        refuse_pointer(path)
        raise RegroupError("a file is not valid JSON", file=path, got=str(error)[:200]) from error
    if not isinstance(value, dict):
        raise RegroupError("a JSON file does not hold an object", file=path, expected="{…}", got=type(value).__name__)
    return value


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read ``config.json``, the index and every safetensors header of a folder, and check them against each other.

    Args:
        folder: with ``config.json`` and ``.safetensors`` files; no hub id.

    Returns:
        The configuration, and every tensor's name, dtype, shape and place; no weight is read.

    Raises:
        RegroupError: anything is missing, truncated, contradictory, outside the folder, or only there as a pickle; or
            it is no plain checkpoint (see ``forms``).
    """
    if not folder.is_dir():
        raise RegroupError(
            "the source is not a folder",
            file=folder,
            expected="a checkpoint folder with config.json and safetensors files",
            remedy="give a local folder, or a hub id such as meta-llama/Llama-2-7b-hf",
        )
    refuse_special(folder)
    refuse_adapter(folder)
    config = read_json(folder / "config.json")
    named = config.get("transformers_weights")
    if named not in (None, SINGLE_FILE, INDEX_FILE):
        raise RegroupError(
            "the config names a weights file of its own, which only transformers would read",
            file=folder / "config.json",
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            got=f"transformers_weights: {named!r}"[:200],
            remedy=f"rename the file to {SINGLE_FILE} and take transformers_weights out of config.json",
        )
    single, index_path = folder / SINGLE_FILE, folder / INDEX_FILE
    index = read_json(index_path) if index_path.exists() else None
    if index is not None:
        files = indexed_files(index_path, index)
        if single.exists() and files != [SINGLE_FILE]:
            raise RegroupError(
                "the folder holds two sets of weights, and programs differ in which one they read",
                file=single,
                expected=f"{SINGLE_FILE} or {INDEX_FILE}, not both",
                got=f"{SINGLE_FILE}, and an index of {', '.join(files[:3])}",
                remedy="move the one that is not meant out of the folder",
            )
    elif single.exists():
        files = [SINGLE_FILE]
    else:
        raise _no_weights(folder)

    shards, metadata, stamps = {}, {}, {}
    for name in files:
        with unreadable(folder / name):
            try:
                stamps[name] = _stamp(folder / name)
            except FileNotFoundError as error:
                raise missing_shard(folder / name) from error
        shards[name], metadata[name] = read_header(folder / name)
    if index is not None:
        _check_index(index_path, index["weight_map"], shards)
    found = Checkpoint(folder, config, shards, metadata, index, stamps)
    refuse_other_forms(folder, config, found.tensors)
    return found


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _allocate(nbytes: int, file: Path, tensor: str) -> torch.Tensor:
    """Memory for a tensor. A header can announce more than a machine has, in a file that is mostly a hole."""
    import torch

    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        if nbytes > memory:
            raise MemoryError
        return torch.empty(nbytes, dtype=torch.uint8)
    except (RuntimeError, MemoryError) as error:
        raise RegroupError(
            "a tensor does not fit into memory",
            file=file,
            tensor=tensor,
            expected=f"at most {human_bytes(memory)}, which this machine has",
            got=human_bytes(nbytes),
            remedy="use a machine with more memory, if the file is what it should be",
        ) from error


def indexed_files(path: Path, index: dict[str, Any], suffix: str = ".safetensors") -> list[str]:
    """The names of the files of an index.

    Raises:
        RegroupError: it has no weight map, or names a file outside its folder or without the suffix.
    """
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RegroupError("an index file has no weight map", file=path, expected='{"weight_map": {tensor: file}}')
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and name == Path(name).name and not name.startswith(".") and "\0" not in name
        if not plain or not name or not name.endswith(suffix):
            raise RegroupError(
                "an index file points outside its folder or at a file of another kind",
                file=path,
                tensor=tensor,
                expected=f"the plain name of a file in the same folder{f', ending in {suffix}' if suffix else ''}",
                got=repr(name)[:200],
                remedy="correct the index, or download the checkpoint again",
            )
    return sorted(set(weight_map.values()))


def _check_index(path: Path, weight_map: dict[str, str], shards: Mapping[str, Mapping[str, TensorEntry]]) -> None:
    for tensor, file in weight_map.items():
        if tensor not in shards[file]:
            held = next((f"in {other}" for other, names in shards.items() if tensor in names), "in no file")
            raise _another_version(
                "the index names a tensor that its file does not hold",
                file=path,
                tensor=tensor,
                expected=f"in {file}",
                got=held,
            )
    for file, names in shards.items():
        for tensor in names:
            if weight_map.get(tensor) != file:
                placed = f"in {weight_map[tensor]}" if tensor in weight_map else "in the index"
                raise _another_version(
                    "a file holds a tensor that the index does not place there",
                    file=path.parent / file,
                    tensor=tensor,
                    expected=placed,
                )


def refuse_pickles(folder: Path) -> None:
    """Refuse a folder whose weights are pickled, without opening it otherwise.

    Raises:
        RegroupError: there is no safetensors file in it, and there are pickles.
    """
    if not any(folder.glob("*.safetensors")) and any(folder.glob("pytorch_model*.bin")):
        raise _no_weights(folder)


def _no_weights(folder: Path) -> RegroupError:
    if (foreign := foreign_weights(folder)) is not None:
        return foreign
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        return RegroupError(
            "the checkpoint holds pickled weights only",
            file=folder / pickles[0],
            expected=f"{SINGLE_FILE} or {INDEX_FILE}",
            remedy="look for a safetensors revision; or, if you trust whoever made the file, pass --allow-pickle, or "
            "make a copy in safetensors once: regroup export FOLDER COPY --to hf --allow-pickle",
        )
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    return RegroupError(
        "the folder holds no weights that can be read",
        file=folder,
        expected=f"{SINGLE_FILE} or {INDEX_FILE}",
        got=", ".join(found[:4]) or "no safetensors file",
        remedy="an index file is needed for weights in several files" if found else None,
    )
