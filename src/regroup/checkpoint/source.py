"""From what the user typed, a folder or a hub id, to a local folder."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import as_named, kind_of
from .companions import refuse_special
from .forms import refuse_other_forms
from .gguf import refuse_gguf
from .header import TensorEntry, read_header, unreadable
from .reader import open_checkpoint, read_json

# Bytes of each end of a tensor that tell it from another.
_SAMPLE = 4096
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[\w.\-]+)?")
_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
_NEVER = ["*.h5", "*.msgpack", "*.onnx", "*.onnx_data", "*.ot", "*.gguf", "*.tflite", "original/*", "*.py"]
_PICKLES = ["*.bin", "*.bin.index.json", "*.pt", "*.pth"]


def fetch(source: str, *, revision: str | None = None, weights: bool = True, pickles: bool = False) -> Path:
    """Return the local folder of a checkpoint, downloading it when ``source`` is a hub id.

    Args:
        source: a folder, or a hub id such as ``"meta-llama/Llama-2-7b-hf"``.
        revision: branch, tag or commit of the hub repository.
        weights: False downloads everything but the weights.
        pickles: True also downloads pickled weights.

    Raises:
        RegroupError: no such folder, and not a hub id or not to be had (offline, gated, absent).
    """
    path = as_named(source)
    if path.exists() or not is_hub_id(source):
        refuse_gguf(path)
        if not path.is_dir():
            kind = kind_of(path)
            raise RegroupError(
                "the source does not exist" if kind == "nothing" else "the source is not a folder",
                file=path,
                expected="a checkpoint folder or a hub id such as meta-llama/Llama-2-7b-hf",
                got=None if kind == "nothing" else kind,
            )
        refuse_special(path)
        return path

    from huggingface_hub import snapshot_download

    ignore = _NEVER + ([] if weights else _WEIGHTS) + ([] if pickles else _PICKLES)
    try:
        return Path(snapshot_download(source, revision=revision, ignore_patterns=ignore))
    except _hub_errors() as error:
        raise _unreachable(source, error) from error


def is_hub_id(source: str) -> bool:
    """True for ``name`` and ``owner/name``, which may be a hub id when no such folder exists."""
    return _HUB_ID.fullmatch(source) is not None and ".." not in source


def remote_headers(repository: str, *, revision: str | None = None) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """The config and every tensor's dtype and shape of a hub repository, without downloading a weight.

    Returns:
        The parsed ``config.json``, and name to entry; byte ranges count from the beginning of each file's data.

    Raises:
        RegroupError: no such repository, no safetensors weights in it, or no network.
    """
    from huggingface_hub import HfApi, hf_hub_download

    try:
        config = read_json(Path(hf_hub_download(repository, "config.json", revision=revision)))
        found = HfApi().get_safetensors_metadata(repository, revision=revision)
    except _hub_errors() as error:
        raise _unreachable(repository, error) from error
    tensors = {
        name: TensorEntry(info.dtype, tuple(info.shape), *info.data_offsets)
        for file in found.files_metadata.values()
        for name, info in file.tensors.items()
    }
    refuse_other_forms(None, config, tensors)
    return config, tensors


def headers_of(repository: str, *, revision: str | None = None) -> tuple[dict[str, Any], Mapping[str, TensorEntry]]:
    """``remote_headers``, or the same from huggingface_hub's cache where the hub is out of reach.

    Raises:
        RegroupError: neither is to be had.
    """
    try:
        return remote_headers(repository, revision=revision)
    except RegroupError as unreachable:
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(repository, revision=revision, local_files_only=True))
        except _hub_errors():
            raise unreachable from None
        checkpoint = open_checkpoint(folder)
        return checkpoint.config, checkpoint.tensors


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises where a repository is absent, closed to us, damaged or out of reach."""
    from huggingface_hub import errors

    # The base of its own errors is that of its HTTP client, whichever that is: a connection that fails raises those.
    client = errors.HfHubHTTPError.__bases__[0]
    own = (errors.EntryNotFoundError, errors.NotASafetensorsRepoError, errors.SafetensorsParsingError)
    return (client, *own, errors.HFValidationError, OSError)


def _unreachable(source: str, error: Exception) -> RegroupError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return RegroupError(
        "the source is neither a local folder nor a hub repository that can be reached",
        got=f"{source}: {lines[0][:200]}",
        remedy="check the spelling and the network (offline, only cached repositories work); "
        "for a gated model run `hf auth login`; or give the path of a local folder",
    )


def fingerprint(folder: Path) -> str:
    """Tells checkpoints apart: config, and of each weight file its header and both ends of every tensor.

    Two conversions of one model may differ only in tensors in the middle of a file.

    Raises:
        RegroupError: a file cannot be read.
    """
    with unreadable(folder / "config.json"):
        digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        try:
            entries = read_header(path)[0]
        except RegroupError:  # a stray file that no index names
            entries = {}
        with unreadable(path), path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            spans = {"": (0, size), **{name: (entry.start, entry.end) for name, entry in entries.items()}}
            for name, (first, end) in spans.items():
                digest.update(f"{path.name} {name} {first} {end}".encode())
                for start in (first, max(first, end - _SAMPLE)):
                    file.seek(start)
                    digest.update(file.read(min(_SAMPLE, end - first)))
    return digest.hexdigest()[:16]
