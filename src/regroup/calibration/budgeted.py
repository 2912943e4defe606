"""A plan within a KV budget, chosen by what the whole model loses on held-out text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ..checkpoint import Checkpoint
from ..layout.types import Layout
from ..plans import Plan
from ..plans.refine import Heads, Refined, refine, trial_limit
from ..processes import SINGLE_PROCESS, ProcessGroup
from .joint import first_tokens, split_batches
from .layer_runner import Inputs
from .sensitivity import Stage, converted_alone, quiet
from .settings import Settings

# Held-out tokens that plans are compared on: differences between plans show on fewer than a loss does.
_TOKENS = 4096


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
    stage: Stage = quiet,
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
    choices = {layer.name: sorted(unit) for layer, unit in zip(layout.layers, units, strict=True)}
    given = (checkpoint, layout, plan, choices, batches, settings)
    with converted_alone(*given, device=device, stage=stage, processes=processes) as layers:
        choosing, reporting = split_batches(layers.held_out)
        model = layers.model(first_tokens(choosing, _TOKENS))
        alone = layers.costs(model)
        costs = [{heads: one.kl for heads, one in alone[layer.name].items()} for layer in layout.layers]
        limit = trial_limit([choices[layer.name] for layer in layout.layers])
        with stage("comparing plans on the whole model", limit, "plans at most") as count:

            def losses(plans: list[Heads]) -> list[float]:
                return model.divergences(plans, progress=count)

            refined = refine(costs, units, budget, losses, limit=limit)
        start_kl, kl = layers.model(reporting).divergences([refined.start, refined.heads])
    picked = [alone[layer.name][number] for layer, number in zip(layout.layers, refined.heads, strict=True)]
    made = replace(plan, layers=tuple(replace(one.want, predicted_kl=one.kl) for one in picked), predicted_kl=kl)
    return Budgeted(made, refined, sum(one.kl for one in picked), start_kl, kl)
