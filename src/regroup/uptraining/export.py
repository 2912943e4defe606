"""The finished model as a checkpoint like the one that was trained: same names, shards, dtypes and companions.

transformers renames and merges tensors when it loads a checkpoint (Mixtral's experts become one tensor, GPT-NeoX's
output layer has had two names) and renames them back when it saves, not always to what was there. So each tensor of the
source is looked up in what the model would save, and before training the two are compared bit for bit.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import Checkpoint, ShardFile, staged_folder
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.reader import INDEX_FILE
from ..checkpoint.writer import copy_file, write_text
from ..errors import RegroupError
from ..modeling import MODELING_FILE
from ..modeling.expected import computed_tables
from ..writer.model_card import TRAIN_FIRST


def stored_names(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The model's state by every name that a checkpoint may give it.

    Args:
        model: a transformers model that was loaded from a checkpoint.
        state: its state by the model's names, where it has to be gathered from several processes.
    """
    # It knows how the checkpoint was loaded, and so how to undo it; transformers has no public name for it.
    from transformers.core_model_loading import revert_weight_conversion

    own = dict(model.state_dict() if state is None else state)
    found = {**own, **revert_weight_conversion(model, dict(own))}
    prefix = f"{model.base_model_prefix}."
    for name, tensor in list(found.items()):
        # Checkpoints of bare models (GPT-2's, BLOOM's) leave the prefix out; some have one that the model lacks.
        found.setdefault(name.removeprefix(prefix), tensor)
        found.setdefault(prefix + name, tensor)
    return found


def freeze_tables(model: Any, stored: Collection[str]) -> None:
    """Keep from training what is computed and not stored, such as Marian's sines: loading makes them trainable.

    Args:
        model: a transformers model.
        stored: names of the checkpoint's tensors.
    """
    ignored = model._keys_to_ignore_on_save or ()
    prefix = f"{model.base_model_prefix}."
    absent = {name for name in computed_tables(model) if not {name, name.removeprefix(prefix)} & set(stored)}
    for name, parameter in model.named_parameters():
        if name in absent or any(re.search(pattern, name) for pattern in ignored):
            parameter.requires_grad_(False)


def check_names(checkpoint: Checkpoint, model: Any, *, values: bool) -> None:
    """Refuse a model whose weights could not be written back under the names of its checkpoint.

    Args:
        checkpoint: that the model was loaded from, or started from.
        model: the model, in float32.
        values: whether nothing was trained yet, so that every tensor has to be the stored one, bit for bit.

    Raises:
        RegroupError: with the tensor.
    """
    found = stored_names(model)
    entries = checkpoint.tensors
    seen: set[int] = set()
    for name, entry in entries.items():
        if entry.dtype not in TORCH_DTYPES or name not in found:
            continue  # copied as it is
        tensor = found[name]
        if tuple(tensor.shape) != entry.shape:
            raise _unknown(checkpoint, name, f"shape {entry.shape}", f"{tuple(tensor.shape)}")
        if values and not torch.equal(_bits(tensor.to(TORCH_DTYPES[entry.dtype])), _bits(checkpoint.read(name))):
            raise _unknown(checkpoint, name, "what was loaded", "other values")
        seen.add(tensor.untyped_storage().data_ptr())
    # Merged tensors are split for the comparison, so their parts lie elsewhere: look at both forms.
    for name, parameter in model.named_parameters():
        # Tables of sines are parameters that are not trained, and often not stored.
        stored = name in entries or parameter.untyped_storage().data_ptr() in seen or not parameter.requires_grad
        if not stored and not _was_split(name, model, entries):
            raise _unknown(checkpoint, name, "a tensor of the checkpoint that holds this parameter", "none")


def _was_split(name: str, model: Any, entries: Mapping[str, Any]) -> bool:
    """Whether a parameter becomes several tensors of the checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    parts = revert_weight_conversion(model, {name: model.get_parameter(name).detach()})
    return len(parts) > 0 and all(part in entries for part in parts)


def _unknown(checkpoint: Checkpoint, name: str, expected: str, got: str) -> RegroupError:
    return RegroupError(
        "the checkpoint's tensors are not those of the loaded model",
        file=checkpoint.folder,
        tensor=name,
        expected=expected,
        got=got,
        remedy="this layout of the weights cannot be written back; save it with transformers first",
    )


def write_model(
    checkpoint: Checkpoint, model: Any, destination: Path, *, state: Mapping[str, Tensor] | None = None, note: str = ""
) -> None:
    """Write the model in the form of its checkpoint, config and companions included, into a folder that is new.

    Args:
        checkpoint: whose names, shards, dtypes and files are taken.
        model, state: see ``stored_names``.
        destination: appears when it is complete.
        note: Markdown for the end of the model card.

    Raises:
        RegroupError: the disk is full; nothing is left behind.
    """
    found = stored_names(model, state)
    with staged_folder(destination) as stage:
        for path in checkpoint.companions():
            copy_file(checkpoint.folder / path, stage / path)
        for file, entries in checkpoint.shards.items():
            specs = {name: (entry.dtype, entry.shape) for name, entry in entries.items()}
            target = ShardFile(stage / file, specs, checkpoint.metadata[file])
            try:
                for name, entry in entries.items():
                    if entry.dtype in TORCH_DTYPES and name in found:
                        target.write(name, found[name].detach().to("cpu", TORCH_DTYPES[entry.dtype]))
                    else:
                        target.copy(checkpoint.folder / file, entry.start, entry.end, target.ranges[name][0])
            finally:
                target.close()
        if checkpoint.index is not None:
            write_text(stage / INDEX_FILE, json.dumps(checkpoint.index, indent=2) + "\n")
        config = dict(checkpoint.config)
        if "regroup" in config:
            copy_file(MODELING_FILE, stage / MODELING_FILE.name)
        else:
            config.pop("auto_map", None)  # code of others is not carried along
        _add_note(stage / "README.md", note)
        write_text(stage / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def _add_note(card: Path, note: str) -> None:
    if not note:
        return
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    # The converter's warning no longer holds.
    text = re.sub(rf"\s{re.escape(TRAIN_FIRST)}", "", text)
    write_text(card, f"{text.rstrip()}\n\n{note}".lstrip())


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
