"""What each layer loses with fewer KV heads, measured on text, each layer alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint import Checkpoint
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from .calibrate import divergences
from .layer_converter import LayerConverter
from .layer_runner import LayerRunner
from .settings import Settings
from .sweep import sweep


@dataclass(frozen=True)
class Measured:
    """One layer at one number of KV heads: how it was converted, and what that cost.

    Attributes:
        want: the layer's plan with the methods and the order that were chosen.
        kl: KL divergence of the original model's predictions from those of the model with this layer alone converted,
            in nats per token of held-out text.
    """

    want: LayerPlan
    kl: float


@torch.no_grad()
def measure(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    choices: Mapping[str, Sequence[int]],
    batches: Sequence[dict[str, torch.Tensor]],
    settings: Settings,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, dict[int, Measured]]:
    """Convert every layer to every number of KV heads, each alone, and see what it does to the model's predictions.

    In one sweep over the layers, what was converted before a layer goes through the original layer along with the
    original hidden states. Those of the held-out text are kept for every choice, (layers × choices × tokens × hidden)
    in float32.

    Args:
        checkpoint, layout: of the original model.
        plan: says by which methods layers are merged, or that they are chosen.
        choices: for each layer by name the numbers of KV heads to try; keeping all costs nothing and is not tried.
        batches: model inputs, of which the last ones are held out.
        settings: see there.
        device: where layers run.
        progress: called with 1 after each decoder layer.
        processes: those that do this together, each on its share of the batches; all get the same answer.
    """
    runner = LayerRunner(checkpoint.folder, layout, processes.shard(batches), device=device)
    converter = LayerConverter(checkpoint, runner, settings, processes)
    plans = {want.name: want for want in plan.layers}

    def wanted(layer: AttentionLayer) -> list[LayerPlan]:
        narrower = (heads for heads in choices[layer.name] if heads != layer.num_key_value_heads)
        return [replace(plans[layer.name], num_key_value_heads=heads) for heads in narrower]

    original = list(runner.hidden)
    converted: dict[tuple[str, int], list[torch.Tensor]] = {}
    found: dict[tuple[str, int], LayerPlan] = {}
    for visit in sweep(converter, wanted, original):
        for states in converted.values():
            for place, batch in enumerate(converter.held_out):
                states[place] = visit.teacher.forward(batch, states[place]).cpu()
        for number, layer in enumerate(visit.layers):
            grouping = visit.groupings.get(layer.name)
            for want in grouping.wants if grouping is not None else ():
                heads, student = want.num_key_value_heads, visit.teacher.copy()
                solvers = visit.groupings[layer.name].solvers(heads)
                found[layer.name, heads], _ = converter.convert(
                    student, visit.layers[: number + 1], solvers, visit.outputs[layer.name], visit.before
                )
                converted[layer.name, heads] = [
                    student.forward(batch, visit.before[batch]).cpu() for batch in converter.held_out
                ]
        original = visit.after
        if progress is not None:
            progress(1)
    costs = divergences(converter, original, converted)
    return {
        layer.name: {
            heads: Measured(found[layer.name, heads], costs[layer.name, heads])
            if heads != layer.num_key_value_heads
            else Measured(replace(plans[layer.name], num_key_value_heads=heads), 0.0)
            for heads in choices[layer.name]
        }
        for layer in layout.layers
    }
