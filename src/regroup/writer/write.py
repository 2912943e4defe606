"""Write a converted checkpoint whose layers are solved: files are copied, tensors are swapped or pooled on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from ..checkpoint.reader import INDEX_FILE
from ..checkpoint.writer import copy_file, write_text
from ..errors import RegroupError
from ..modeling import MODELING_FILE
from ..plans import PLAN_FILE, RESULT_FILE, Result
from .changes import SolvedTensor, planned_changes, stored_tensors
from .journal import Journal
from .model_card import model_card
from .preview import Prepared
from .shards import ShardWriter, converted_index


def write(
    prepared: Prepared,
    result: Result,
    stage: Path,
    journal: Journal,
    *,
    name: str | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a converted checkpoint into a folder, except for the weight files that a killed run finished.

    Args:
        prepared: what is written (see ``prepare``).
        result: the plan with everything that was found.
        stage: the folder.
        journal: of this folder; its store has all the layers of ``prepared.solved``.
        name: of the original model, for the model card; its folder by default.
        workers: threads that read, pool and write.
        progress: called from any thread with the number of bytes just written.

    Raises:
        RegroupError: a solved layer that is not complete, a source that changes, or a system that refuses.
    """
    checkpoint, ahead = prepared.checkpoint, prepared.preview
    for path in prepared.companions:
        copy_file(checkpoint.folder / path, stage / path)
    planned, _ = planned_changes(checkpoint, prepared.layout, result.plan)
    changed = planned | stored_tensors(journal.store, prepared.solved)
    # Solved from the weights as it is written, it would not belong to the rest of its layer.
    lacking = [(how.layer, name) for name, how in changed.items() if isinstance(how, SolvedTensor)]
    if lacking:
        layer, name = lacking[0]
        raise RegroupError(
            "a solved layer lacks a tensor",
            file=journal.store.path(layer),
            layer=layer,
            tensor=name,
            remedy="give the same command again: it starts anew",
        )
    writer = ShardWriter(
        checkpoint,
        ahead.shards,
        changed,
        stage,
        finished=journal.finished,
        done=journal.finish,
        workers=workers,
        progress=progress,
    )
    writer.run()
    if checkpoint.index is not None:
        index = converted_index(checkpoint.index, ahead.shards)
        write_text(stage / INDEX_FILE, json.dumps(index, indent=2) + "\n")
    write_text(stage / PLAN_FILE, prepared.plan.dumps())
    if result.plan != prepared.plan or result.calibration is not None:
        write_text(stage / RESULT_FILE, result.dumps())
    write_text(stage / "README.md", model_card(name or str(checkpoint.folder), prepared, result))
    if not ahead.stock:
        copy_file(MODELING_FILE, stage / MODELING_FILE.name)
    # Last, so that a folder with a config.json is complete.
    write_text(stage / "config.json", json.dumps(prepared.config, indent=2, ensure_ascii=False) + "\n")
    journal.end()
