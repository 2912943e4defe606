"""The files that are copied with a checkpoint's weights: tokenizer, generation config and all others in its folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import RegroupError
from ..files import kind_of

# Weights in other formats are the original model's, not the converted one's; caches and version control are noise.
_LEFT_BEHIND = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".gguf",
    ".ggml",
    ".tflite",
    ".ot",
    ".npz",
    ".index.json",
    ".py",
    ".lock",
)


def refuse_special(folder: Path) -> None:
    """Refuse a checkpoint folder in which a name stands for neither a file nor a folder.

    Libraries open what they find by its name, and reading a pipe that nobody writes to, or a device, never ends.

    Raises:
        RegroupError: naming it and what it is; or the folder cannot be read.
    """
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise RegroupError("the folder cannot be read", file=folder, got=error.strerror or str(error)) from error
    for path in paths:
        _refuse_special(path)


def _refuse_special(path: Path) -> None:
    try:
        kind = kind_of(path)
    except OSError as error:
        raise RegroupError(
            "a file of the checkpoint cannot be read", file=path, got=error.strerror or str(error)
        ) from error
    if kind not in ("a file", "a folder", "nothing"):
        raise RegroupError(
            "the checkpoint's folder holds something that is not a file",
            file=path,
            expected="a file",
            got=kind,
            remedy="replace it by the file, or remove it",
        )


def companion_files(folder: Path) -> Iterator[Path]:
    """Paths, relative to the folder, of the files that are copied with the weights.

    Raises:
        RegroupError: a link points out of the folder, or something is neither a file nor a folder.
    """
    root = folder.resolve()
    # In huggingface_hub's cache every file is a link into the blobs folder of the same repository.
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts):
            continue
        _refuse_special(path)
        if not path.is_file():
            continue
        if relative.as_posix() == "config.json" or path.name.endswith(_LEFT_BEHIND):
            continue
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in allowed):
            raise RegroupError(
                "a link in the source folder points out of it",
                file=path,
                expected=f"a file below {root}",
                got=target,
                remedy="replace the link by the file, or remove it",
            )
        yield relative
