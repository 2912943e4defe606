"""The local stage: each attention layer learns the output of the original model's, one layer after the other.

This is the distillation that conversion with text does, for a model that is converted already. Both models run side by
side, layer by layer; the attention of the converted model is trained, on one pass over the text, to give the output of
the original attention, plus the error of the residual stream before it where that is known. It needs no backward pass
through the whole model.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.calibrate import add_residual_gap
from ..calibration.layer_regression import LayerRegression
from ..calibration.layer_runner import LayerRunner
from ..calibration.settings import DistillSettings
from ..checkpoint import staged_folder
from ..modeling import load
from ..opening import open_source
from ..processes import rank
from . import states
from .job import Job
from .learning import NothingLearnedError
from .listener import Listener

# Share of the batches that is judged on and never fitted, as in conversion on text.
_HELD_OUT = 0.125


def local_stage(job: Job, listener: Listener) -> None:
    """Train the student's attention on the first ``job.local_steps`` batches, in the first process alone.

    The student is changed in place, and kept in ``local/`` of the output: a run that is broken off later does not do
    this again. Hidden states of all those batches lie in memory twice, in float32.

    Raises:
        NothingLearnedError: the data ended before there were that many batches.
    """
    recipe = job.recipe
    # Every process reads them, and so stands where the next stage begins.
    stream = job.stream.batches(recipe.batch_size)
    batches = [{k: v for k, v in batch.items() if k != "labels"} for batch in islice(stream, job.local_steps)]
    if len(batches) < job.local_steps:
        raise NothingLearnedError(
            "the data ended within the local stage",
            expected=f"{job.local_steps} batches of {recipe.batch_size}, as the recipe asks for",
            got=f"{len(batches)} batches",
            remedy="give more data, fewer tokens or steps, or more epochs in the recipe",
        )
    folder = recipe.output / states.LOCAL_FOLDER
    if rank() == 0:
        assert job.teacher_folder is not None
        with listener.stage("layer by layer", job.source.layout.layers[-1].index + 1, "layers") as count:
            errors = distill_layers(
                job.checkpoint.folder,
                job.teacher_folder,
                job.student,
                batches,
                str(job.arguments.device),
                progress=count,
            )
        for name, (before, after) in errors.items():
            listener.notice(f"{name}: attention output missed by {before:.1%}, now {after:.1%}")
        with staged_folder(folder) as stage, states.quiet_files():
            job.student.save_pretrained(stage)
        return
    while not (folder / "config.json").is_file():
        time.sleep(1)  # a barrier would time out; a failure of the first process ends all
    job.student.load_state_dict(load(folder, dtype=torch.float32, progress=False).state_dict())


def distill_layers(
    converted_folder: Path,
    original_folder: Path,
    student: Any,
    batches: Sequence[dict[str, Tensor]],
    device: str = "cpu",
    *,
    progress: Callable[[int], None] = lambda count: None,
) -> dict[str, tuple[float, float]]:
    """Distil every attention layer whose heads the two folders have in different numbers.

    Args:
        converted_folder, original_folder: checkpoints.
        student: the converted model, which gets the trained weights.
        batches: model inputs. Positions that begin again within a window are left out: here both models see the whole
            window.
        device: where layers run.
        progress: called with 1 after each decoder layer.

    Returns:
        For each such layer the relative error of its attention output on held-out batches, before and after.
    """
    model_inputs = [{name: value for name, value in batch.items() if name != "position_ids"} for batch in batches]
    for inputs in model_inputs:
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
    with open_source(str(converted_folder)) as own, open_source(str(original_folder)) as other:
        layouts = own.layout, other.layout
    converted, original = (
        LayerRunner(folder, layout, model_inputs, device=device)
        for folder, layout in zip((converted_folder, original_folder), layouts, strict=True)
    )
    kept = max(1, round(len(model_inputs) * _HELD_OUT))
    fit, held_out = range(len(model_inputs) - kept), range(len(model_inputs) - kept, len(model_inputs))
    lower, upper = [h.clone() for h in converted.hidden], [h.clone() for h in original.hidden]
    errors: dict[str, tuple[float, float]] = {}
    for index in range(len(converted)):
        teacher_layer, student_layer = original.layer(index), converted.layer(index)
        layers, teacher_layers = converted.attention_layers(index), original.attention_layers(index)
        outputs: dict[str, list[Tensor]] = {layer.name: [] for layer in teacher_layers}
        after = []
        with torch.no_grad():
            for batch, hidden in enumerate(upper):
                observed, result = teacher_layer.observe(batch, hidden, teacher_layers, whole=True)
                for layer in teacher_layers:
                    outputs[layer.name].append(observed[layer.name].output.cpu())
                assert result is not None
                after.append(result.cpu())
        for number, (layer, teacher_attention) in enumerate(zip(layers, teacher_layers, strict=True)):
            if layer.num_key_value_heads == teacher_attention.num_key_value_heads:
                continue
            add_residual_gap(layer, outputs[teacher_attention.name], upper, lower)
            regression = LayerRegression(
                student_layer, layers[: number + 1], outputs.pop(teacher_attention.name), lower, held_out
            )
            errors[layer.name] = regression.distill(fit, DistillSettings())
            trained = student_layer.attention(layer).state_dict()
            student.base_model.get_submodule(layer.module).load_state_dict(trained)
        with torch.no_grad():
            lower = [student_layer.forward(batch, hidden).cpu() for batch, hidden in enumerate(lower)]
        upper = after
        progress(1)
    return errors
