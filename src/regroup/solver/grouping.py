"""Which heads form a group: those whose sharing loses the least energy, of keys and values together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan, query_order, search_groups
from .heads import HeadWeights
from .residuals import LayerResiduals
from .statistics import LayerStatistics, ungrouped_statistics


def group_by_weights(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    *,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The plan with heads grouped by what the weights alone say (C = I), where that is allowed and lowers the residual.

    Layers that must share one order are searched together. Orders that the plan names stay. With calibration text,
    layers that have an order of their own are left to it.

    Args:
        checkpoint, layout, plan: of the original model.
        progress: called with 1 after each attention layer.
    """
    found: dict[str, LayerPlan] = {}
    sharing: dict[tuple[str, int], list[tuple[LayerPlan, AttentionLayer]]] = {}
    for want, layer in zip(plan.layers, layout.layers, strict=True):
        # With keys or values alone to go by, the other might be hurt, and without text that would go unnoticed.
        pooled = layer.key_obstacle is not None or layer.value_obstacle is not None
        skipped = pooled or (plan.calibration is not None and layer.order_group is None)
        if not skipped and layer.fixed_order is None and want.query_order is None and want.changes:
            # Layers of one order group with different G share an order only if none is searched.
            sharing.setdefault((layer.order_group or layer.name, want.num_key_value_heads), []).append((want, layer))
        elif progress is not None:
            progress(1)
    names = [name for name, _ in sharing]
    for (name, groups), members in sharing.items():
        # A layer that is left as it is keeps its order, and so must those that share it.
        whole = len(members) == sum((layer.order_group or layer.name) == name for layer in layout.layers)
        if whole and names.count(name) == 1 and groups > 1:
            statistics = [
                (layer, ungrouped_statistics(HeadWeights.read(layer, checkpoint.read))) for _, layer in members
            ]
            order = best_order(statistics, groups, seed=plan.seed)
            if order is not None:
                found |= {want.name: replace(want, query_order=order) for want, _ in members}
        if progress is not None:
            progress(len(members))
    return replace(plan, layers=tuple(found.get(want.name, want) for want in plan.layers))


def best_order(
    layers: Sequence[tuple[AttentionLayer, LayerStatistics]], groups: int, *, seed: int
) -> tuple[int, ...] | None:
    """The order of query heads whose groups lose least, or None if neighbouring groups do.

    Args:
        layers: that share one order, each with statistics of all heads as one group in their own order.
        groups: the number of groups.
        seed: of the search.
    """
    residuals = [LayerResiduals(layer, statistics, groups) for layer, statistics in layers]
    if not any(layer.parts for layer in residuals):
        return None
    units = residuals[0].units
    table = sum((layer.pair_costs() for layer in residuals), torch.zeros(units, units, dtype=torch.float64))
    chosen = search_groups(
        lambda members: sum(layer.cost(members) for layer in residuals), table.tolist(), units, groups, seed=seed
    )
    return query_order(chosen, residuals[0].queries_per_unit)


def weight_losses(
    checkpoint: Checkpoint,
    layout: Layout,
    choices: Mapping[str, Sequence[int]],
    *,
    progress: Callable[[int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """For each layer and number of KV heads the share of energy that neighbouring groups lose; not the model's loss.

    Args:
        checkpoint, layout: of the original model.
        choices: for each layer by name the numbers of KV heads; keeping all of them loses nothing.
        progress: called with 1 after each attention layer.

    Returns:
        Mean shares of keys and values, from the weights alone.

    Raises:
        RegroupError: a layer that linear maps pass through neither by keys nor by values.
    """
    found: dict[str, dict[int, float]] = {}
    for layer in layout.layers:
        statistics = ungrouped_statistics(HeadWeights.read(layer, checkpoint.read))
        found[layer.name] = {
            groups: _neighbours_lose(layer, statistics, groups)
            for groups in choices[layer.name]
            if groups != layer.num_key_value_heads
        } | {layer.num_key_value_heads: 0.0}
        if progress is not None:
            progress(1)
    return found


def _neighbours_lose(layer: AttentionLayer, statistics: LayerStatistics, groups: int) -> float:
    residuals = LayerResiduals(layer, statistics, groups)
    if not residuals.parts:
        raise RegroupError(
            "the weights do not tell what sharing heads costs this layer",
            layer=layer.name,
            got=f"keys: {layer.key_obstacle}; values: {layer.value_obstacle}",
            remedy="pass --calibration, or give numbers of KV heads",
        )
    size = residuals.units // groups
    members = (tuple(range(group * size, (group + 1) * size)) for group in range(groups))
    return sum(map(residuals.cost, members)) / len(residuals.parts)
