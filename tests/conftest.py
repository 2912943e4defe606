"""What all tests share: no network, one thread, and every tiny checkpoint saved and converted once a session."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before huggingface_hub is imported anywhere, subprocesses included

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tiny
from helpers import convert_heads, head_map

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a family's checkpoint in float32. Shared: copy it (``helpers.copy``) before changing it."""
    folders: dict[str, Path] = {}

    def save(name: str) -> Path:
        if name not in folders:
            folders[name] = tiny.save(name, tmp_path_factory.mktemp("parents") / name)
        return folders[name]

    return save


@pytest.fixture(scope="session")
def converted(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """The folder of a family's checkpoint after conversion, by the kind of plan (see ``helpers.head_map``). Shared."""
    folders: dict[tuple[str, str], Path] = {}

    def convert(name: str, kind: str) -> Path:
        key = (name, kind)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("children") / f"{name}-{kind}"
            convert_heads(saved(name), folders[key], head_map(name, kind))
        return folders[key]

    return convert


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent, a child of it and texts to uptrain and to judge on. Shared: copy what is changed."""
    import runs

    folder = tmp_path_factory.mktemp("shop")
    runs.pair(folder)
    runs.text(folder)
    return folder
