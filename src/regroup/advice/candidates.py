"""The candidates: the original model, each uniform number of KV heads, and plans by layer with the same cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..bench.build import read_config
from ..conversion.plan import measured
from ..errors import human_kv_heads
from ..layout import Layout, detect
from ..listener import Listener
from ..opening import Source, open_source
from ..plans import CalibrationText, Plan, allocate, allowed_kv_heads, layer_units, make_plan, spelled_out, token_bytes
from ..writer.converted_config import converted_config

# The name of the first candidate.
ORIGINAL = "the original model"


@dataclass(frozen=True)
class Candidate:
    """A plan, the converted config, and the estimate of its loss: summed KL on text, or lost energy."""

    name: str
    config: dict[str, Any]
    plan: Plan | None
    kl: float | None = None
    energy: float | None = None


def plans_of(
    source: str, calibration: CalibrationText, *, repair: str = "output", device: str | None = None
) -> dict[str, Plan]:
    """The plan of every candidate, by name, with its predicted KL."""
    config, _ = read_config(source)
    with open_source(source) as opened:
        found = candidates(opened, config, calibration, Listener(), 1, repair, device)
    return {candidate.name: candidate.plan for candidate in found if candidate.plan is not None}


def _uniform(layout: Layout, tensor_parallel: int) -> list[int]:
    """Numbers of KV heads that every layer may have, in descending order, without that of the original model."""
    allowed = [set(allowed_kv_heads(layer, tensor_parallel)) for layer in layout.layers]
    present = {layer.num_key_value_heads for layer in layout.layers}
    return sorted(set.intersection(*allowed) - (present if len(present) == 1 else set()), reverse=True)


def from_config(config: Mapping[str, Any], tensor_parallel: int) -> list[Candidate]:
    """Candidates of a config without weights: uniform numbers of KV heads only."""
    layout = detect(config)
    found = [Candidate(ORIGINAL, dict(config), None)]
    for heads in _uniform(layout, tensor_parallel):
        plan = make_plan(layout, heads, method="auto", tensor_parallel=tensor_parallel)
        found.append(Candidate(human_kv_heads(heads), converted_config(dict(config), layout, plan), plan))
    return found


def candidates(
    opened: Source,
    config: Mapping[str, Any],
    calibration: CalibrationText | None,
    listener: Listener,
    tensor_parallel: int,
    repair: str,
    device: str | None,
) -> list[Candidate]:
    """The original model, each uniform G, and for each the plan by layer with the least loss in the same cache."""
    layout = opened.layout
    start = make_plan(layout, layers={}, method="auto", grouping="search", calibration=calibration, repair=repair)
    start = replace(start, tensor_parallel=tensor_parallel)
    units = [layer_units(layer, tensor_parallel=tensor_parallel) for layer in layout.layers]
    choices = {layer.name: sorted(unit) for layer, unit in zip(layout.layers, units, strict=True)}
    wants: list[dict[int, Any]]
    if calibration is None:
        from ..solver.grouping import weight_losses

        with listener.searching(len(layout.layers)) as count:
            lost = weight_losses(opened.checkpoint, layout, choices, progress=count)
        costs = [{heads: lost[layer.name][heads] for heads in choices[layer.name]} for layer in layout.layers]
        wants = [
            {heads: replace(want, num_key_value_heads=heads) for heads in choices[want.name]} for want in start.layers
        ]
    else:
        one = measured(opened, start, choices, listener, device=device)
        costs = [{heads: found.kl for heads, found in one[layer.name].items()} for layer in layout.layers]
        wants = [
            {heads: replace(found.want, predicted_kl=found.kl) for heads, found in one[layer.name].items()}
            for layer in layout.layers
        ]

    def candidate(name: str, heads: Sequence[int]) -> Candidate:
        total = sum(cost[g] for cost, g in zip(costs, heads, strict=True))
        plan = replace(start, layers=tuple(want[g] for want, g in zip(wants, heads, strict=True)))
        plan = plan if calibration is None else spelled_out(replace(plan, predicted_kl=total), layout)
        made = converted_config(dict(config), layout, plan)
        if calibration is None:
            return Candidate(name, made, plan, energy=total / len(heads))
        return Candidate(name, made, plan, kl=total)

    found = [
        Candidate(
            ORIGINAL,
            dict(config),
            None,
            kl=None if calibration is None else 0.0,
            energy=0.0 if calibration is None else None,
        )
    ]
    for heads in _uniform(layout, tensor_parallel):
        same = [heads] * len(layout.layers)
        found.append(candidate(human_kv_heads(heads), same))
        budget = sum(token_bytes(layer, heads) for layer in layout.layers)
        by_layer = allocate(costs, units, budget)
        if by_layer != same:
            found.append(candidate(f"by layer, as {human_kv_heads(heads)}", by_layer))
    return found
