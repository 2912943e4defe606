"""Convert a checkpoint folder without ever holding more than a few tensors of it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, staged_folder
from ..checkpoint.header import nbytes_of
from ..checkpoint.reader import INDEX_FILE
from ..checkpoint.writer import check_destination, copy_file, write_text
from ..layout.kv_cache import cache_dtype, kv_cache_bytes
from ..layout.types import Layout
from ..modeling import MODELING_FILE
from ..modeling.expected import check_generation_config, check_loadable
from ..plans import Plan
from .config import child_config, is_stock
from .estimate import Forecast
from .journal import PLAN_FILE, Journal
from .model_card import model_card
from .rewrite import Change, Given, rewrites
from .shards import Shards, ShardWriter, Spec, child_index

CALIBRATION_FILE = "regroup_calibration.json"


@dataclass(frozen=True)
class Preview:
    """What a conversion would write, known from headers alone.

    Attributes:
        shards: file name to tensor name to (dtype, shape), in the order of the data.
        changed: how to make every tensor that changes.
        bytes_before, bytes_after: of tensor data.
        kv_bytes_before, kv_bytes_after: of KV cache for one token, in
        kv_dtype: the checkpoint's own, by its common name.
        stock: whether stock transformers classes load the result.
    """

    shards: Shards
    changed: dict[str, Change]
    bytes_before: int
    bytes_after: int
    kv_bytes_before: int
    kv_bytes_after: int
    kv_dtype: str
    stock: bool

    @property
    def tensors(self) -> dict[str, Spec]:
        """Every tensor of the result by name."""
        return {name: spec for names in self.shards.values() for name, spec in names.items()}


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote; after a dry run ``destination`` is None, and the forecast says what it would take."""

    destination: Path | None
    preview: Preview
    plan_digest: str
    seconds: float
    forecast: Forecast | None = None


def preview(checkpoint: Checkpoint, layout: Layout, plan: Plan, given: Mapping[str, Given] | None = None) -> Preview:
    """Check a plan against a checkpoint and say what carrying it out would write.

    ``given`` are tensors that were made beforehand, from calibration text; they replace what the plan would make.

    Raises:
        RegroupError: the plan does not fit.
    """
    plan.check(layout)
    tensors = checkpoint.tensors
    changed: dict[str, Change] = {}
    dropped: set[str] = set()
    for layer, want in zip(layout.layers, plan.layers, strict=True):
        new, gone = rewrites(layer, want, tensors, std=layout.initializer_std, seed=plan.seed)
        changed |= new
        dropped |= gone
    for name, tensor in (given or {}).items():
        changed[name] = tensor
    shards = {
        file: {
            name: Spec(entry.dtype, changed[name].shape if name in changed else entry.shape)
            for name, entry in entries.items()
            if name not in dropped
        }
        for file, entries in checkpoint.shards.items()
    }
    wanted = tuple(
        layer.with_kv_heads(p.num_key_value_heads) for layer, p in zip(layout.layers, plan.layers, strict=True)
    )
    dtype, called = cache_dtype(layout.dtype)
    return Preview(
        shards=shards,
        changed=changed,
        bytes_before=checkpoint.nbytes,
        bytes_after=sum(nbytes_of(*spec) for names in shards.values() for spec in names.values()),
        kv_bytes_before=kv_cache_bytes(layout.layers, dtype=dtype),
        kv_bytes_after=kv_cache_bytes(wanted, dtype=dtype),
        kv_dtype=called,
        stock=is_stock(layout, plan),
    )


@dataclass(frozen=True)
class Ready:
    """A conversion that was checked as far as it can be without writing.

    Attributes:
        checkpoint, plan, preview: what is converted, how, and into what.
        config, card: the child's config.json and model card.
        companions: files that are copied, relative to the parent's folder.
        calibration: record of the text that the conversion used, or None.
        nbytes: of everything that will be written, about.
    """

    checkpoint: Checkpoint
    plan: Plan
    preview: Preview
    config: dict[str, Any]
    card: str
    companions: tuple[Path, ...]
    calibration: dict[str, Any] | None
    nbytes: int


def prepare(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    *,
    parent: str | None = None,
    given: Mapping[str, Given] | None = None,
    calibration: dict[str, Any] | None = None,
) -> Ready:
    """Check everything about a conversion that can be known before the first byte is written.

    Args:
        checkpoint, layout, plan: the parent, what it is, and what is wanted.
        parent: what to call the parent in the model card; its folder by default.
        given: tensors made beforehand, from calibration text.
        calibration: record of that text and of what was chosen on it.

    Raises:
        RegroupError: the plan does not fit, transformers would not load the result as a whole, or the parent's files
            cannot travel along.
    """
    ahead = preview(checkpoint, layout, plan, given)
    config = child_config(checkpoint.config, layout, plan)
    # The result holds the names of the source, so that what is missing from one is missing from the other.
    check_loadable(config, ahead.tensors, checkpoint.folder)
    check_generation_config(checkpoint.folder)
    # What a parent's own conversion was is not what this one is: `verify` would believe it.
    records = (PLAN_FILE, CALIBRATION_FILE)
    companions = tuple(path for path in checkpoint.companions() if path.as_posix() not in records)
    card = next((checkpoint.folder / path for path in companions if path.as_posix() == "README.md"), None)
    return Ready(
        checkpoint=checkpoint,
        plan=plan,
        preview=ahead,
        config=config,
        card=model_card(
            parent or str(checkpoint.folder),
            layout,
            plan,
            stock=ahead.stock,
            parent_card=card,
            calibrated=calibration is not None,
        ),
        companions=companions,
        calibration=calibration,
        nbytes=ahead.bytes_after + sum((checkpoint.folder / path).stat().st_size for path in companions),
    )


def write(
    ready: Ready,
    destination: Path,
    *,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
    asked: str | None = None,
    notice: Callable[[str], None] | None = None,
) -> Conversion:
    """Write what was prepared, or go on where a run that was killed had come to.

    Args:
        ready: see ``prepare``.
        destination: a folder that does not exist yet. It appears when everything in it is on the disk.
        workers: threads that read, merge and write.
        progress: called from any thread with the number of bytes just written.
        asked: digest of the plan that a search made this one of.
        notice: told in words of a killed run that is gone on with, or cannot be.

    Raises:
        RegroupError: bad destination, a source that changes, or a full disk; nothing is left behind.
    """
    started = time.perf_counter()
    checkpoint, ahead = ready.checkpoint, ready.preview
    check_destination(destination, checkpoint.folder, ready.nbytes)
    calibrated = ready.calibration is not None
    journal = Journal(checkpoint, ready.plan, ahead.shards, asked=asked, calibrated=calibrated, notice=notice)
    with staged_folder(destination, adopt=journal.adopt) as stage:
        for path in ready.companions:
            copy_file(checkpoint.folder / path, stage / path)
        journal.begin(stage)
        writer = ShardWriter(
            checkpoint,
            ahead.shards,
            ahead.changed,
            stage,
            finished=journal.finished,
            done=journal.finish,
            workers=workers,
            progress=progress,
        )
        writer.run()
        if checkpoint.index is not None:
            write_text(stage / INDEX_FILE, json.dumps(child_index(checkpoint.index, ahead.shards), indent=2) + "\n")
        if ready.calibration is not None:
            write_text(stage / CALIBRATION_FILE, json.dumps(ready.calibration, indent=2) + "\n")
        write_text(stage / "README.md", ready.card)
        if not ahead.stock:
            copy_file(MODELING_FILE, stage / MODELING_FILE.name)
        # Last, so that a folder with a config.json is complete.
        write_text(stage / "config.json", json.dumps(ready.config, indent=2, ensure_ascii=False) + "\n")
        journal.end()
    return Conversion(destination, ahead, ready.plan.digest(), time.perf_counter() - started)


def convert(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    destination: Path,
    *,
    parent: str | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Conversion:
    """``prepare`` and ``write`` in one: the arguments are theirs."""
    ready = prepare(checkpoint, layout, plan, parent=parent)
    return write(ready, destination, workers=workers, progress=progress)
