"""What each layer loses with fewer KV heads, measured on text, each layer alone."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.solve import LayerSolution
from .install import stored_tensors
from .joint import Heads, JointModel, KeptSolutions
from .layer_converter import LayerConverter
from .layer_runner import Inputs, LayerRunner
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


def measure(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    choices: Mapping[str, Sequence[int]],
    batches: Sequence[Inputs],
    settings: Settings,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, dict[int, Measured]]:
    """Convert every layer to every number of KV heads, each alone, and see what it does to the model's predictions.

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
    with tempfile.TemporaryDirectory(prefix="regroup-") as folder:
        kept = KeptSolutions(Path(folder) if processes.rank == 0 else None)
        wants, held_out = solve_alone(
            checkpoint,
            layout,
            plan,
            choices,
            batches,
            settings,
            kept,
            device=device,
            progress=progress,
            processes=processes,
        )
        model = JointModel(checkpoint, layout, held_out, kept.load, device=device, processes=processes)
        return costs_alone(model, wants)


@torch.no_grad()
def solve_alone(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    choices: Mapping[str, Sequence[int]],
    batches: Sequence[Inputs],
    settings: Settings,
    kept: KeptSolutions,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[dict[str, dict[int, LayerPlan]], list[Inputs]]:
    """Convert every layer to every number of KV heads, on the hidden states of the original model, in one sweep.

    Args:
        kept: where the solutions are kept.
        checkpoint, layout, plan, choices, batches, settings, device, progress, processes: see ``measure``.

    Returns:
        For each layer by name and each number of KV heads its plan with the methods and the order that were chosen; and
        the batches that were held out.
    """
    runner = LayerRunner(checkpoint.folder, layout, processes.shard(batches), device=device)
    converter = LayerConverter(checkpoint, runner, settings, processes)
    plans = {want.name: want for want in plan.layers}

    def wanted(layer: AttentionLayer) -> list[LayerPlan]:
        narrower = (heads for heads in choices[layer.name] if heads != layer.num_key_value_heads)
        return [replace(plans[layer.name], num_key_value_heads=heads) for heads in narrower]

    found = {
        layer.name: {heads: replace(plans[layer.name], num_key_value_heads=heads) for heads in choices[layer.name]}
        for layer in layout.layers
    }
    for visit in sweep(converter, wanted, list(runner.hidden)):
        for number, layer in enumerate(visit.layers):
            grouping = visit.groupings.get(layer.name)
            for want in grouping.wants if grouping is not None else ():
                heads, student = want.num_key_value_heads, visit.teacher.copy()
                solvers = visit.groupings[layer.name].solvers(heads)
                chosen, outcome = converter.convert(
                    student,
                    visit.layers[: number + 1],
                    solvers,
                    visit.outputs[layer.name],
                    visit.before,
                    visit.before,
                )
                tensors = stored_tensors(student, layer, checkpoint)
                kept.keep(layer.name, LayerSolution(chosen, tensors, outcome))
                found[layer.name][heads] = chosen
        if progress is not None:
            progress(1)
    count = sum(processes.all_gather(len(converter.held_out)))
    return found, list(batches[len(batches) - count :])


def costs_alone(
    model: JointModel, wants: Mapping[str, Mapping[int, LayerPlan]], *, progress: Callable[[int], object] | None = None
) -> dict[str, dict[int, Measured]]:
    """What each layer costs at each number of KV heads while all other layers are the original model's.

    Args:
        model: with the solutions of these layers.
        wants: as ``solve_alone`` gives them.
        progress: called with how many were just measured.
    """
    original = model.original
    variants: dict[tuple[str, int], Heads] = {
        (layer.name, heads): (*original[:place], heads, *original[place + 1 :])
        for place, layer in enumerate(model.layout.layers)
        for heads in wants[layer.name]
        if heads != layer.num_key_value_heads
    }
    costs = dict(zip(variants, model.divergences(list(variants.values()), progress=progress), strict=True))
    return {
        name: {heads: Measured(want, costs.get((name, heads), 0.0)) for heads, want in by_heads.items()}
        for name, by_heads in wants.items()
    }
