"""From what a user names to an open checkpoint whose heads are understood."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .checkpoint import Checkpoint, fetch, headers_of, is_hub_id, open_checkpoint, scratch_folder
from .checkpoint.pickles import pickled_files, unpickle
from .files import as_named
from .layout import Layout, detect


@dataclass(frozen=True)
class Source:
    """A parent, opened and understood."""

    name: str
    folder: Path  # where it was found; the checkpoint itself may be a copy of unpickled weights
    checkpoint: Checkpoint
    layout: Layout

    @property
    def ignores_code(self) -> bool:
        """True if the folder asks for code of its own, which is neither run nor carried along."""
        return "auto_map" in self.checkpoint.config and "regroup" not in self.checkpoint.config


@contextlib.contextmanager
def open_source(
    name: str, *, revision: str | None = None, allow_pickle: bool = False, scratch: Path | None = None
) -> Iterator[Source]:
    """Open a checkpoint folder or hub id and detect its layout.

    Args:
        name: a folder, or a hub id (downloaded).
        revision: of the hub repository.
        allow_pickle: read pickled weights, with torch's restricted unpickler, where there is nothing else.
        scratch: a folder on a disk with room for the weights, used only for pickles.

    Raises:
        RegroupError: not to be found, damaged, unknown, or only there as a pickle.
    """
    folder = found = fetch(name, revision=revision, pickles=allow_pickle)
    with contextlib.ExitStack() as stack:
        if allow_pickle and pickled_files(folder):
            where = scratch or Path(tempfile.gettempdir())
            copy = stack.enter_context(scratch_folder(where, ".regroup-pickle-"))
            unpickle(folder, copy)
            folder = copy
        checkpoint = open_checkpoint(folder)
        yield Source(name, found, checkpoint, detect(checkpoint.config, checkpoint.tensors))


def open_layout(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> Layout:
    """The layout alone; of a hub repository from its headers, without downloading a weight.

    Raises:
        RegroupError: as ``open_source``.
    """
    if not as_named(name).exists() and is_hub_id(name) and not allow_pickle:
        return detect(*headers_of(name, revision=revision))
    with open_source(name, revision=revision, allow_pickle=allow_pickle) as source:
        return source.layout
