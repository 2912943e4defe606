"""How much each layer minds having fewer KV heads: measured on text, each alone, or guessed from the weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from ..checkpoint import Checkpoint
from ..layout.types import Layout
from ..plans import LayerPlan, Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.grouping import Groupings, contiguous_residual
from ..solver.heads import HeadWeights
from ..solver.moments import weight_moments
from .calibrate import divergences
from .layer_converter import AttentionWorker, Settings
from .layer_runner import LayerStream


@dataclass(frozen=True)
class Measured:
    """One layer at one number of KV heads: how it was converted, and what that cost.

    Attributes:
        want: the layer's plan with the methods and the order that were chosen.
        kl: KL divergence of the parent's predictions from those of the model with this layer alone converted, nats a
            token of held-out text.
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
    """Convert every layer to every G, each alone, and see what it does to the model's predictions.

    One sweep over the layers: what was converted before a layer goes through the parent's copy of it along with the
    parent's own hidden states. Those of the held-out text are kept for every choice, (layers × choices × tokens ×
    hidden) in float32.

    Args:
        checkpoint, layout: of the parent.
        plan: says how layers are merged where ``settings.choose`` is off.
        choices: for each layer by name the numbers of KV heads to try; the parent's own costs nothing and is not tried.
        batches: model inputs, of which the last ones are held out.
        settings: see there.
        device: where layers run.
        progress: called with 1 after each decoder layer.
        processes: the processes that do this together, each on its share of the batches; all get the same answer.
    """
    stream = LayerStream(checkpoint.folder, layout, processes.shard(batches), device=device)
    worker = AttentionWorker(checkpoint, stream, settings, processes)
    wants = {want.name: want for want in plan.layers}
    parent = list(stream.hidden)
    alive: dict[tuple[str, int], list[torch.Tensor]] = {}
    found: dict[tuple[str, int], LayerPlan] = {}
    for index in range(len(stream)):
        layers = stream.attention_layers(index)
        tried = {
            layer.name: [
                replace(wants[layer.name], num_key_value_heads=heads)
                for heads in choices[layer.name]
                if heads != layer.num_key_value_heads
            ]
            for layer in layers
        }
        teacher = stream.layer(index)
        for states in alive.values():
            for place, batch in enumerate(worker.held_out):
                states[place] = teacher.forward(batch, states[place]).cpu()
        groupings = [
            Groupings(
                layer,
                HeadWeights.read(layer, checkpoint.read),
                tried[layer.name],
                search=settings.search,
                seed=settings.seed,
            )
            for layer in layers
        ]
        outputs, after = worker.observe(teacher, layers, parent, groupings)
        for number, (layer, grouping) in enumerate(zip(layers, groupings, strict=True)):
            for want in tried[layer.name]:
                pupil, options = teacher.copy(), grouping.options(want.num_key_value_heads)
                chosen, _ = worker.convert(
                    pupil, layers[: number + 1], grouping.weights, options, outputs[layer.name], parent
                )
                key = (layer.name, want.num_key_value_heads)
                found[key] = chosen
                alive[key] = [pupil.forward(batch, parent[batch]).cpu() for batch in worker.held_out]
        parent = after
        if progress is not None:
            progress(1)
    costs = divergences(stream, worker, parent, alive)
    return {
        layer.name: {
            heads: Measured(found[layer.name, heads], costs[layer.name, heads])
            if heads != layer.num_key_value_heads
            else Measured(replace(wants[layer.name], num_key_value_heads=heads), 0.0)
            for heads in choices[layer.name]
        }
        for layer in layout.layers
    }


def guess(
    checkpoint: Checkpoint,
    layout: Layout,
    choices: Mapping[str, Sequence[int]],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """For each layer and G the share of energy that neighbouring groups lose, from the weights alone; not a loss.

    Raises:
        RegroupError: a layer that linear maps pass through neither by keys nor by values.
    """
    found: dict[str, dict[int, float]] = {}
    for layer in layout.layers:
        weights = HeadWeights.read(layer, checkpoint.read)
        moments = weight_moments(weights, tuple(range(layer.num_attention_heads)), 1)
        found[layer.name] = {
            heads: contiguous_residual(layer, weights, moments, heads)
            for heads in choices[layer.name]
            if heads != layer.num_key_value_heads
        } | {layer.num_key_value_heads: 0.0}
        if progress is not None:
            progress(1)
    return found
