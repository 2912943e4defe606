"""Which heads form a group, by the residual energy that sharing them would leave, keys and values together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ..calibration.decoder_layer import Seen
from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import AttentionLayer, Layout
from ..merge import linear_residual, pair_residuals, rotary_residual
from ..merge.rotary import Pairs
from ..plans import LayerPlan, Plan, query_order, search_groups
from ..processes import SINGLE_PROCESS, ProcessGroup
from .heads import HeadWeights
from .moments import Gatherer, Moments, weight_moments


def search_plan(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    *,
    shared_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """The plan with heads grouped by what the weights alone say (C = I), where that is allowed and lowers the residual.

    Layers that must share one order are searched together. Orders that the plan names stay.

    Args:
        checkpoint, layout, plan: of the parent.
        shared_only: leave out layers with an order of their own, which calibration text groups better.
        progress: called with 1 after each attention layer.
    """
    found: dict[str, LayerPlan] = {}
    together: dict[tuple[str, int], list[tuple[LayerPlan, AttentionLayer]]] = {}
    for want, layer in zip(plan.layers, layout.layers, strict=True):
        # With keys or values alone to go by, the other might be hurt, and without text nobody would see it.
        pooled = layer.key_obstacle is not None or layer.value_obstacle is not None
        skipped = pooled or (shared_only and layer.order_group is None)
        if not skipped and layer.fixed_order is None and want.query_order is None and want.changes:
            # Layers of one order group with different G share an order only if none is searched.
            together.setdefault((layer.order_group or layer.name, want.num_key_value_heads), []).append((want, layer))
        elif progress is not None:
            progress(1)
    names = [name for name, _ in together]
    for (name, groups), members in together.items():
        # A layer that is left as it is keeps its order, and so must those that share it.
        whole = len(members) == sum((layer.order_group or layer.name) == name for layer in layout.layers)
        if whole and names.count(name) == 1 and groups > 1:
            seen = []
            for _, layer in members:
                weights = HeadWeights.read(layer, checkpoint.read)
                moments = weight_moments(weights, tuple(range(layer.num_attention_heads)), 1)
                seen.append(_Residuals(layer, weights, moments, groups))
            order = _search(seen, groups, plan.seed)
            if order is not None:
                found |= {want.name: replace(want, query_order=order) for want, _ in members}
        if progress is not None:
            progress(len(members))
    return replace(plan, layers=tuple(found.get(want.name, want) for want in plan.layers))


@dataclass(frozen=True)
class Option:
    """One way to group a layer's heads, and the moments for it."""

    want: LayerPlan
    moments: Moments


class Groupings:
    """The ways to group one layer's heads that are worth a try on text: the plan's, and what a search finds.

    Args:
        layer, weights: of the parent.
        wants: what is wanted of the layer, perhaps several numbers of KV heads.
        search: whether to search where the family allows it and no order is named.
        seed: of the search.
    """

    def __init__(
        self, layer: AttentionLayer, weights: HeadWeights, wants: Sequence[LayerPlan], *, search: bool, seed: int
    ) -> None:
        self.layer, self.weights, self.wants, self.seed = layer, weights, wants, seed
        # Layers that share one order need a search over all of them at once, which a stream cannot have.
        free = search and layer.fixed_order is None and layer.order_group is None
        self._searched = [want for want in wants if free and want.query_order is None and want.num_key_value_heads > 1]
        own_order = tuple(range(layer.num_attention_heads))
        self._whole = Gatherer(layer, weights, own_order, 1, attended=False) if self._searched else None
        self._found: list[tuple[LayerPlan, Gatherer]] = []

    @property
    def looks_first(self) -> bool:
        """True if text has to be looked at once more, before the moments of groups are gathered."""
        return self._whole is not None

    def look(self, seen: Seen, query_mask: torch.Tensor | None, memory_mask: torch.Tensor | None) -> None:
        """Count a batch for the search."""
        assert self._whole is not None
        self._whole.add(seen, query_mask, memory_mask)

    def settle(self, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        """Decide which groupings are tried; moments of their groups can be gathered from then on."""
        candidates = list(self.wants)
        if self._whole is not None:
            self._whole.merge(processes)
            for order, want in zip(processes.from_first(self._orders), self._searched, strict=True):
                if order is not None:
                    candidates.append(replace(want, query_order=order))
        self._found = [
            (want, Gatherer(self.layer, self.weights, want.order, want.num_key_value_heads)) for want in candidates
        ]

    def add(self, seen: Seen, query_mask: torch.Tensor | None, memory_mask: torch.Tensor | None) -> None:
        """Count a batch for the moments."""
        for _, gatherer in self._found:
            gatherer.add(seen, query_mask, memory_mask)

    def merge(self, processes: ProcessGroup) -> None:
        """Count what the other processes counted for the moments."""
        for _, gatherer in self._found:
            gatherer.merge(processes)

    def options(self, kv_heads: int) -> list[Option]:
        """What there is for a number of KV heads, the plan's own order first."""
        return [
            Option(want, gatherer.moments()) for want, gatherer in self._found if want.num_key_value_heads == kv_heads
        ]

    def _orders(self) -> list[tuple[int, ...] | None]:
        assert self._whole is not None
        moments = self._whole.moments()
        return [
            searched(self.layer, self.weights, moments, want.num_key_value_heads, seed=self.seed)
            for want in self._searched
        ]


def searched(
    layer: AttentionLayer, weights: HeadWeights, moments: Moments, groups: int, *, seed: int
) -> tuple[int, ...] | None:
    """The order of query heads whose groups lose least, or None if neighbouring groups do.

    Args:
        layer, weights: of the parent.
        moments: of all heads as one group in their own order.
        groups: G of the child.
        seed: of the search.
    """
    return _search([_Residuals(layer, weights, moments, groups)], groups, seed)


def contiguous_residual(layer: AttentionLayer, weights: HeadWeights, moments: Moments, groups: int) -> float:
    """What neighbouring heads lose by sharing, the mean of keys and values, each as a share of the layer's energy.

    Args as ``searched``.

    Raises:
        RegroupError: neither keys nor values can be shared by linear maps.
    """
    residuals = _Residuals(layer, weights, moments, groups)
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


def _search(layers: Sequence[_Residuals], groups: int, seed: int) -> tuple[int, ...] | None:
    if not any(layer.parts for layer in layers):
        return None
    units = layers[0].units
    table = sum((layer.pair_table() for layer in layers), torch.zeros(units, units, dtype=torch.float64))
    chosen = search_groups(
        lambda members: sum(layer.cost(members) for layer in layers), table.tolist(), units, groups, seed=seed
    )
    return query_order(chosen, layers[0].queries_per_unit)


class _Residuals:
    """What groups of one layer lose, each of keys and values as a share of the layer's energy.

    Units are KV heads where a group can hold whole ones, else query heads, each with a copy of its KV head.
    """

    def __init__(self, layer: AttentionLayer, weights: HeadWeights, moments: Moments, groups: int) -> None:
        H, G, D = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        whole = G % groups == 0
        self.units, self.queries_per_unit = (G, H // G) if whole else (H, 1)
        place = torch.arange(self.units) // (self.units // G)

        def spread(stacked: torch.Tensor) -> torch.Tensor:
            blocks = stacked.view(G, D, G, D)[place][:, :, place]
            return blocks.reshape(self.units * D, self.units * D)

        def summed(grams: torch.Tensor) -> torch.Tensor:
            return grams.double().view(self.units, self.queries_per_unit, D, D).sum(1)

        # Grams, moments, and what rotates, for keys and values.
        self.parts: list[tuple[torch.Tensor, torch.Tensor, tuple[Pairs, int] | None]] = []
        if layer.key_obstacle is None:
            rotary = None if layer.rotary is None else (layer.rotary.pairs, layer.rotary.dim)
            self.parts.append((summed(moments.query), spread(moments.key[0]), rotary))
        if layer.value_obstacle is None:
            output = weights.output.double()
            self.parts.append((summed(output @ output.mT), spread(moments.value[0]), None))
        self.D = D
        self._energy = [sum(self._residual(part, (unit,))[1] for unit in range(self.units)) for part in self.parts]

    def cost(self, members: tuple[int, ...]) -> float:
        """What these units lose if they share one head."""
        return sum(
            self._residual(part, members)[0] / energy
            for part, energy in zip(self.parts, self._energy, strict=True)
            if energy > 0
        )

    def pair_table(self) -> torch.Tensor:
        """The cost of any two units, (units, units) float64."""
        table = torch.zeros(self.units, self.units, dtype=torch.float64)
        for (grams, moments, rotary), energy in zip(self.parts, self._energy, strict=True):
            own = torch.tensor([self._residual((grams, moments, rotary), (unit,))[1] for unit in range(self.units)])
            if energy > 0:
                table += pair_residuals(grams, moments, rotary) * (own + own.unsqueeze(1)) / energy
        return table

    def _residual(
        self, part: tuple[torch.Tensor, torch.Tensor, tuple[Pairs, int] | None], members: tuple[int, ...]
    ) -> tuple[float, float]:
        grams, moments, rotary = part
        index, D = torch.tensor(members), self.D
        blocks = moments.view(self.units, D, self.units, D)[index][:, :, index]
        own = blocks.reshape(len(members) * D, len(members) * D)
        if rotary is None:
            return linear_residual(grams[index], own, range(len(members)))
        return rotary_residual(grams[index], own, range(len(members)), pairs=rotary[0], dim=rotary[1])
