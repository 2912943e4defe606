"""Open a checkpoint by folder or hub id and detect its layout."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, fetch, headers_of, is_hub_id, open_checkpoint, scratch_folder
from .checkpoint.forms import refuse_adapter
from .checkpoint.pickles import pickled_files, unpickle
from .checkpoint.reader import read_json
from .families import family_for
from .families.reading import stored_ties, ties
from .files import as_named
from .layout import Layout, detect
from .layout.spelling import as_known


@dataclass(frozen=True)
class Source:
    """An original model: the opened checkpoint and its layout."""

    name: str
    folder: Path  # where it was found; the checkpoint itself may be a copy of unpickled weights
    checkpoint: Checkpoint
    layout: Layout

    @property
    def ignores_code(self) -> bool:
        """True if the folder asks for code of its own, which is neither run nor copied."""
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
    found = fetch(name, revision=revision, pickles=allow_pickle)
    with unpickled(name, found, allow_pickle=allow_pickle, scratch=scratch) as folder:
        checkpoint = open_checkpoint(folder)
        checkpoint = replace(checkpoint, config=dict(as_known(checkpoint.config)))
        yield Source(name, found, checkpoint, layout_of(checkpoint))


@contextlib.contextmanager
def readable(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> Iterator[str]:
    """A name under which a checkpoint can be read as safetensors: its own, or a copy's while the block lasts.

    For what opens a checkpoint by its name. The copy's folder has the name of the original's, for records.

    Args:
        name, revision, allow_pickle: as for ``open_source``; without ``allow_pickle`` the name stays as it is.

    Raises:
        RegroupError: see ``pickles.unpickle``.
    """
    path = Path(name).expanduser()
    if not allow_pickle or path.is_file():
        yield name
        return
    found = fetch(name, revision=revision, pickles=True)
    with unpickled(name, found, allow_pickle=True) as folder:
        yield name if folder == found else str(folder)


@contextlib.contextmanager
def unpickled(name: str, found: Path, *, allow_pickle: bool, scratch: Path | None = None) -> Iterator[Path]:
    """The folder itself, or a copy of it with pickled weights as safetensors, while the block lasts."""
    if not allow_pickle or not pickled_files(found):
        yield found
        return
    refuse_adapter(found)
    where = scratch or Path(tempfile.gettempdir())
    with scratch_folder(where, ".regroup-pickle-") as scratch_copy:
        copy = scratch_copy / (Path(name).expanduser().resolve().name or "checkpoint")
        copy.mkdir()
        unpickle(found, copy, _tied(as_known(read_json(found / "config.json"))))
        yield copy


def layout_of(checkpoint: Checkpoint) -> Layout:
    """The layout of an open checkpoint.

    A stored output head that differs from the embedding counts, whatever the config says of tying: so transformers
    loads it, and every T5 1.1 that transformers 5 has saved is such a checkpoint.

    Raises:
        RegroupError: see ``detect``; a weight that cannot be read.
    """
    layout = detect(checkpoint.config, checkpoint.tensors)
    family = family_for(as_known(checkpoint.config))
    if layout.tied_embeddings and family is not None:
        head = family.tied[0][0]
        pair = [pair for pair in stored_ties(family, checkpoint.tensors) if pair[0] == head]
        if pair and not checkpoint.same(*pair[0]):
            return replace(layout, tied_embeddings=False)
    return layout


def _tied(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Pairs of names that are one parameter of the model, with the base model's prefix and without it."""
    family = family_for(config)
    if family is None or not (family.always_ties or ties(config, family)):
        return []
    return [
        (target.removeprefix(prefix), source.removeprefix(other))
        for target, source in family.tied
        for prefix in family.prefixes
        for other in family.prefixes
    ]


def open_headers(
    name: str, *, revision: str | None = None, allow_pickle: bool = False
) -> tuple[dict[str, Any], Layout]:
    """The config and the layout alone; of a hub repository from its headers, without downloading a weight.

    Raises:
        RegroupError: as ``open_source``.
    """
    if not as_named(name).exists() and is_hub_id(name) and not allow_pickle:
        config, tensors = headers_of(name, revision=revision)
        return dict(as_known(config)), detect(config, tensors)
    with open_source(name, revision=revision, allow_pickle=allow_pickle) as source:
        return source.checkpoint.config, source.layout


def open_layout(name: str) -> Layout:
    """The layout alone (see ``open_headers``)."""
    return open_headers(name)[1]
