"""The files that travel with a checkpoint's weights: tokenizer, generation config and whatever else lies there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import RegroupError

# Weights in other formats describe the parent and would contradict the child; caches and version control are noise.
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


def companion_files(folder: Path) -> Iterator[Path]:
    """Paths, relative to the folder, of the files that travel with the weights.

    Raises:
        RegroupError: a link points out of the folder.
    """
    root = folder.resolve()
    # In huggingface_hub's cache every file is a link into the blobs folder of the same repository.
    allowed = [root] + ([root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [])
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if any(part.startswith(".") for part in relative.parts) or not path.is_file():
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
