"""The local stage: each attention layer of the child learns what the parent's does, one layer after the other.

This is the distillation of ``regroup.convert``, from a child that exists aljob. Both models run side by side, layer
by layer; the child's attention is trained, on one pass over the text, to give what the parent's attention gives, plus
what the child's residual stream lacks by then where that is known. It needs no backward pass through the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibrate import add_lack
from ..calibration.layer_regression import Lesson
from ..calibration.layer_runner import LayerStream
from ..calibration.repair import DistillSettings
from ..checkpoint import staged_folder
from ..modeling import load
from ..opening import open_source
from ..processes import rank
from . import states
from .enough import NothingLearntError
from .job import Job
from .watch import Listener

# Share of the batches that is judged on and never fitted, as in conversion on text.
_HELD_OUT = 0.125


def local_stage(job: Job, told: Listener) -> None:
    """Train the student's attention on the first ``job.local_steps`` batches, in the first process alone.

    The student is changed in place, and kept in ``local/`` of the output: a run that is broken off later does not do
    this again. Hidden states of all those batches lie in memory twice, in float32.

    Raises:
        NothingLearntError: the data ended before there were that many batches.
    """
    recipe = job.recipe
    # Every process reads them, and so stands where the next stage begins.
    stream = job.stream.batches(recipe.batch_size)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(stream, job.local_steps)]
    if len(batches) < job.local_steps:
        raise NothingLearntError(
            "the data ended within the local stage",
            expected=f"{job.local_steps} batches of {recipe.batch_size}, as the recipe asks for",
            got=f"{len(batches)} batches",
            remedy="give more data, fewer tokens or steps, or more epochs in the recipe",
        )
    folder = recipe.output / states.LOCAL_FOLDER
    if rank() == 0:
        assert job.teacher_folder is not None
        with told.stage("layer by layer", job.source.layout.layers[-1].index + 1, "layers") as count:
            errors = distill_layers(
                job.checkpoint.folder,
                job.teacher_folder,
                job.student,
                batches,
                str(job.arguments.device),
                progress=count,
            )
        for name, (before, after) in errors.items():
            told.notice(f"{name}: attention output missed by {before:.1%}, now {after:.1%}")
        with staged_folder(folder) as stage, states.quiet_files():
            job.student.save_pretrained(stage)
        return
    while not (folder / "config.json").is_file():
        time.sleep(1)  # a barrier would time out; a failure of the first process ends all
    job.student.load_state_dict(load(folder, dtype=torch.float32, progress=False).state_dict())


def distill_layers(
    child_folder: Path,
    parent_folder: Path,
    student: Any,
    batches: Sequence[dict[str, Tensor]],
    device: str = "cpu",
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, tuple[float, float]]:
    """Distil every attention layer whose heads the two folders have in different numbers.

    Args:
        child_folder, parent_folder: checkpoints.
        student: the child's model, which gets the trained weights.
        batches: model inputs. Positions that begin again within a window are left out: here both models see the whole
            window.
        device: where layers run.
        progress: called with 1 after each decoder layer.

    Returns:
        For each such layer the share of the parent's attention output that held-out batches missed, before and after.
    """
    given = [{name: value for name, value in batch.items() if name != "position_ids"} for batch in batches]
    for inputs in given:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    with open_source(str(child_folder)) as own, open_source(str(parent_folder)) as other:
        layouts = own.layout, other.layout
    child, parent = (
        LayerStream(folder, layout, given, device=device)
        for folder, layout in zip((child_folder, parent_folder), layouts, strict=True)
    )
    kept = max(1, round(len(given) * _HELD_OUT))
    fit, held_out = range(len(given) - kept), range(len(given) - kept, len(given))
    lower, upper = [h.clone() for h in child.hidden], [h.clone() for h in parent.hidden]
    errors: dict[str, tuple[float, float]] = {}
    for index in range(len(child)):
        teacher, pupil = parent.layer(index), child.layer(index)
        layers, taught = child.attention_layers(index), parent.attention_layers(index)
        outputs: dict[str, list[Tensor]] = {layer.name: [] for layer in taught}
        after = []
        with torch.no_grad():
            for batch, hidden in enumerate(upper):
                seen, result = teacher.observe(batch, hidden, taught, whole=True)
                for layer in taught:
                    outputs[layer.name].append(seen[layer.name].output.cpu())
                assert result is not None
                after.append(result.cpu())
        for number, (layer, its) in enumerate(zip(layers, taught, strict=True)):
            if layer.num_key_value_heads == its.num_key_value_heads:
                continue
            add_lack(layer, outputs[its.name], upper, lower)
            lesson = Lesson(pupil, layers[: number + 1], outputs.pop(its.name), lower, held_out)
            errors[layer.name] = lesson.distill(fit, DistillSettings())
            trained = pupil.attention(layer).state_dict()
            student.base_model.get_submodule(layer.module).load_state_dict(trained)
        with torch.no_grad():
            lower = [pupil.forward(batch, hidden).cpu() for batch, hidden in enumerate(lower)]
        upper = after
        progress(1)
    return errors
