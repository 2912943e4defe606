"""The ways to group one layer's heads that are tried on text: the plan's own, and what a search finds on the text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..layout.types import AttentionLayer
from ..plans import LayerPlan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.grouping import best_order
from ..solver.heads import HeadWeights
from ..solver.solve import LayerSolver
from ..solver.statistics import LayerStatistics
from .decoder_layer import AttentionTrace
from .moments import MomentSums


class Groupings:
    """Statistics of one layer on text, for each way to group its heads.

    Text is counted once with ``add_for_search`` if ``searches``; after ``choose`` it is counted with ``add``.

    Args:
        layer, weights: of the original model.
        wants: plans of the layer, perhaps with several numbers of KV heads.
        search: whether to search where the family allows it and the plan names no order.
        seed: of the search.
    """

    def __init__(
        self, layer: AttentionLayer, weights: HeadWeights, wants: Sequence[LayerPlan], *, search: bool, seed: int
    ) -> None:
        self.layer, self.weights, self.wants, self.seed = layer, weights, wants, seed
        # Layers that share one order would have to be searched together, and here they come one after the other.
        free = search and layer.fixed_order is None and layer.order_group is None
        self._searched = [want for want in wants if free and want.query_order is None and want.num_key_value_heads > 1]
        own_order = tuple(range(layer.num_attention_heads))
        self._ungrouped = MomentSums(layer, weights, own_order, 1, attended=False) if self._searched else None
        self._sums: list[tuple[LayerPlan, MomentSums]] = []

    @property
    def searches(self) -> bool:
        """Whether text has to be counted once more, before the groupings are known."""
        return self._ungrouped is not None

    def add_for_search(
        self, trace: AttentionTrace, query_mask: torch.Tensor | None, memory_mask: torch.Tensor | None
    ) -> None:
        """Count a batch for the search."""
        assert self._ungrouped is not None
        self._ungrouped.add(trace, query_mask, memory_mask)

    def choose(self, processes: ProcessGroup = SINGLE_PROCESS) -> None:
        """Decide which groupings are tried."""
        tried = list(self.wants)
        if self._ungrouped is not None:
            self._ungrouped.merge(processes)
            for order, want in zip(processes.from_first(self._orders), self._searched, strict=True):
                if order is not None:
                    tried.append(replace(want, query_order=order))
        self._sums = [
            (want, MomentSums(self.layer, self.weights, want.order, want.num_key_value_heads)) for want in tried
        ]

    def add(self, trace: AttentionTrace, query_mask: torch.Tensor | None, memory_mask: torch.Tensor | None) -> None:
        """Count a batch for the moments of every grouping."""
        for _, sums in self._sums:
            sums.add(trace, query_mask, memory_mask)

    def merge(self, processes: ProcessGroup) -> None:
        """Add what the other processes counted."""
        for _, sums in self._sums:
            sums.merge(processes)

    def solvers(self, kv_heads: int) -> list[LayerSolver]:
        """A solver for each grouping into this many KV heads, the plan's own order first."""
        return [
            LayerSolver(self.layer, want, LayerStatistics(self.weights, sums.moments()))
            for want, sums in self._sums
            if want.num_key_value_heads == kv_heads
        ]

    def _orders(self) -> list[tuple[int, ...] | None]:
        assert self._ungrouped is not None
        statistics = LayerStatistics(self.weights, self._ungrouped.moments())
        return [
            best_order([(self.layer, statistics)], want.num_key_value_heads, seed=self.seed) for want in self._searched
        ]
