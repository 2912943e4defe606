"""A checkpoint folder in another form: same shards and files, another config, some tensors rewritten."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint
from ..checkpoint.reader import INDEX_FILE
from ..checkpoint.writer import copy_file, write_text
from ..errors import RegroupError
from ..modeling import MODELING_FILE
from ..solver.rewrite import Change
from ..writer.preview import OWN_RECORDS
from ..writer.shards import ShardWriter, Spec, converted_index

CONFIGURATION_FILE = Path(__file__).with_name("configuration_nemotron_nas.py")


def write_folder(
    checkpoint: Checkpoint,
    stage: Path,
    config: Mapping[str, Any],
    changed: Mapping[str, Change],
    *,
    note: str,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a checkpoint into a folder that exists.

    Args:
        checkpoint: that is exported.
        stage: the folder, to be renamed by the caller when everything is in it.
        config: the new config.json; the code that it asks for (``auto_map``) is copied too.
        changed: how to make the tensors that change; the others are copied byte for byte.
        note: one sentence for the end of the model card.
        progress: called with the number of bytes just written.
    """
    for path in checkpoint.companions():
        if changed and path.as_posix() in OWN_RECORDS:  # they would describe other heads than these
            continue
        copy_file(checkpoint.folder / path, stage / path)
    shards = {
        file: {n: Spec(e.dtype, changed[n].shape if n in changed else e.shape) for n, e in entries.items()}
        for file, entries in checkpoint.shards.items()
    }
    ShardWriter(checkpoint, shards, changed, stage, progress=progress).run()
    if checkpoint.index is not None:
        write_text(stage / INDEX_FILE, json.dumps(converted_index(checkpoint.index, shards), indent=2) + "\n")
    asked = {str(reference).partition(".")[0] for reference in config.get("auto_map", {}).values()}
    for file in (MODELING_FILE, CONFIGURATION_FILE):
        if file.stem in asked:
            copy_file(file, stage / file.name)
    card = stage / "README.md"
    try:
        text = card.read_text(encoding="utf-8") if card.exists() else ""
    except UnicodeDecodeError as error:
        raise RegroupError(
            "the source's model card cannot be read",
            file=checkpoint.folder / card.name,
            expected="UTF-8",
            got=str(error),
            remedy="correct or remove it",
        ) from error
    written = f"Exported by regroup {importlib.metadata.version('regroup-gqa')}: {note}"
    write_text(card, f"{text.rstrip()}\n\n{written}\n".lstrip())
    write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
