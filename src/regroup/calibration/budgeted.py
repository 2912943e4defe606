"""A plan within a KV budget, chosen by what the whole model loses on held-out text."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..errors import RegroupError, human_bytes
from ..layout.types import Layout
from ..plans import Plan
from ..plans.refine import Heads, Refined, refine, trial_limit
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.heads import projection_tensors
from .joint import JointModel, KeptSolutions, first_tokens, split_batches
from .layer_runner import Inputs
from .sensitivity import costs_alone, solve_alone
from .settings import Settings

# Held-out tokens that plans are compared on: differences between plans show on fewer than a loss does.
_TOKENS = 4096

# Begins a stage of the work: its title, how much there is of what; gives a function to call with what was just done.
Stage = Callable[[str, int, str], AbstractContextManager[Callable[[int], object]]]


def _quiet(*_: object) -> AbstractContextManager[Callable[[int], object]]:
    return nullcontext(lambda count: None)


@dataclass(frozen=True)
class Budgeted:
    """What was found.

    Attributes:
        plan: with the numbers of KV heads, the methods and orders that were chosen, and the predictions.
        refined: how the numbers were found, and the losses on the text that they were chosen on.
        summed: the sum of what the single layers of the plan cost alone, on the same text.
        start_kl, kl: KL divergence of the knapsack's plan and of this one on text that they were not chosen on, with
            all layers converted at once, in nats per token.
    """

    plan: Plan
    refined: Refined
    summed: float
    start_kl: float
    kl: float


def plan_within(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    units: Sequence[Mapping[int, int]],
    budget: int,
    batches: Sequence[Inputs],
    settings: Settings,
    *,
    device: str = "cpu",
    stage: Stage = _quiet,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Budgeted:
    """Find the numbers of KV heads within a budget that change the model's predictions least.

    Each layer alone is converted to each number, and its solution kept on the disk. The numbers are then searched for
    (``plans.refine``) with whole models put together from these solutions, on one half of the held-out text; the other
    half tells what to expect of the plan.

    Args:
        checkpoint, layout: of the original model.
        plan: says by which methods layers are merged, or that they are chosen.
        units: for each layer the numbers of KV heads it may have, and what each takes of the budget.
        budget: the most that all layers may take.
        batches: model inputs, of which the last ones are held out.
        settings: see there.
        device: where layers run.
        stage: told of progress.
        processes: those that do this together; all get the same answer.

    Raises:
        RegroupError: no room for the solutions, numbers that are not finite, or as ``calibrate``.
    """
    with tempfile.TemporaryDirectory(prefix="regroup-") as folder:
        if processes.rank == 0:
            _check_room(checkpoint, layout, units, Path(folder))
        kept = KeptSolutions(Path(folder) if processes.rank == 0 else None)
        choices = {layer.name: sorted(unit) for layer, unit in zip(layout.layers, units, strict=True)}
        with stage("converting each layer alone", layout.layers[-1].index + 1, "layers") as count:
            wants, held_out = solve_alone(
                checkpoint,
                layout,
                plan,
                choices,
                batches,
                settings,
                kept,
                device=device,
                progress=count,
                processes=processes,
            )
        choosing, reporting = split_batches(held_out)

        def model_of(text: Sequence[Inputs]) -> JointModel:
            return JointModel(checkpoint, layout, text, kept.load, device=device, processes=processes)

        model = model_of(first_tokens(choosing, _TOKENS))
        narrower = sum(heads != layer.num_key_value_heads for layer in layout.layers for heads in choices[layer.name])
        with stage("measuring each layer alone", narrower, "conversions") as count:
            alone = costs_alone(model, wants, progress=count)
        costs = [{heads: one.kl for heads, one in alone[layer.name].items()} for layer in layout.layers]
        limit = trial_limit([choices[layer.name] for layer in layout.layers])
        with stage("comparing plans on the whole model", limit, "plans at most") as count:

            def losses(plans: list[Heads]) -> list[float]:
                return model.divergences(plans, progress=count)

            refined = refine(costs, units, budget, losses, limit=limit)
        start_kl, kl = model_of(reporting).divergences([refined.start, refined.heads])
    picked = [alone[layer.name][number] for layer, number in zip(layout.layers, refined.heads, strict=True)]
    made = replace(plan, layers=tuple(replace(one.want, predicted_kl=one.kl) for one in picked), predicted_kl=kl)
    return Budgeted(made, refined, sum(one.kl for one in picked), start_kl, kl)


def _check_room(checkpoint: Checkpoint, layout: Layout, units: Sequence[Mapping[int, int]], folder: Path) -> None:
    """Refuse to begin where the solutions do not fit on the disk."""
    needed = 0
    for layer, unit in zip(layout.layers, units, strict=True):
        infos = [checkpoint.tensors[name] for name in projection_tensors(layer)]
        whole = sum(TORCH_DTYPES[info.dtype].itemsize * math.prod(info.shape) for info in infos)
        needed += whole * sum(heads != layer.num_key_value_heads for heads in unit)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RegroupError(
            "there is no room for the converted layers that are compared",
            file=folder.parent,
            expected=f"{human_bytes(needed)} at most",
            got=f"{human_bytes(free)} free",
            remedy="set TMPDIR to a folder with more room",
        )
