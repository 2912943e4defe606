"""Copy pickled weights to safetensors, with torch's restricted unpickler."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RegroupError
from .companions import companion_files
from .header import missing_shard, refuse_pointer
from .reader import INDEX_FILE, SINGLE_FILE, indexed_files, read_json
from .writer import save_tensors

if TYPE_CHECKING:
    import torch

_SINGLE = "pytorch_model.bin"
_INDEX = "pytorch_model.bin.index.json"
_PICKLE_ERRORS = (EOFError, pickle.UnpicklingError)


def pickled_files(folder: Path) -> list[Path]:
    """The pickled shards of a checkpoint that has no safetensors; empty if it has, or has neither.

    Raises:
        RegroupError: an index names a file outside the folder.
    """
    if (folder / SINGLE_FILE).exists() or (folder / INDEX_FILE).exists():
        return []
    if (folder / _INDEX).exists():
        return [folder / name for name in indexed_files(folder / _INDEX, read_json(folder / _INDEX), suffix="")]
    return [folder / _SINGLE] if (folder / _SINGLE).exists() else []


def unpickle(folder: Path, copy: Path, tied: Sequence[tuple[str, str]] = ()) -> None:
    """Write a copy of a pickled checkpoint with its weights as safetensors, a shard at a time.

    Only tensors are unpickled (``torch.load(weights_only=True)``): a pickle that wants anything else is refused.

    Args:
        folder: with the pickled weights.
        copy: where the copy goes; a folder that is there and empty.
        tied: pairs of names that are one parameter of the model. Where the two share memory, the first is left out, as
            ``save_pretrained`` does; tensors that share memory without being one parameter get bytes of their own.

    Raises:
        RegroupError: a shard is missing, damaged, or holds more than a table of tensors.
    """
    import torch

    files = pickled_files(folder)
    weight_map: dict[str, str] = {}
    total = 0
    for number, path in enumerate(files, 1):
        if not path.exists():
            raise missing_shard(path)
        refuse_pointer(path)
        try:
            # Pickles from before torch 1.6 are no zip files and cannot be mapped.
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        # The unpickler reports damage by whatever its parsing runs into.
        except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, *_PICKLE_ERRORS) as error:
            raise RegroupError(
                "pickled weights cannot be read safely",
                file=path,
                expected="a pickled table of tensors",
                got=str(error).splitlines()[0][:160] if str(error) else type(error).__name__,
                remedy="look for a safetensors revision of the checkpoint",
            ) from error
        pairs = state.items() if isinstance(state, dict) else [(None, None)]
        if not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in pairs):
            raise RegroupError("pickled weights are not a table of tensors", file=path, got=type(state).__name__)
        left_out = {one for one, other in tied if one in state and other in state and _shared(state[one], state[other])}
        # safetensors allows no shared memory.
        tensors = {name: value.detach().clone().contiguous() for name, value in state.items() if name not in left_out}
        # The names that other tools look for.
        name = SINGLE_FILE if len(files) == 1 else f"model-{number:05}-of-{len(files):05}.safetensors"
        save_tensors(tensors, copy / name, {"format": "pt"})
        # The copy has the original's time of change, so that a conversion can be resumed.
        status = path.stat()
        os.utime(copy / name, ns=(status.st_atime_ns, status.st_mtime_ns))
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (copy / INDEX_FILE).write_text(json.dumps(index, indent=2), encoding="utf-8")
    for path in [Path("config.json"), *companion_files(folder)]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        if (folder / path).is_file():
            shutil.copyfile(folder / path, copy / path)


def _shared(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same numbers at the same place in memory."""
    places = [
        (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.numel() > 0) for tensor in (one, other)
    ]
    return places[0] == places[1]
