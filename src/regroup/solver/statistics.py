"""What is known of one attention layer before its heads are shared: second moments, of its weights or of text.

Sharing is solved from these alone (``solver.solve``). ``weight_statistics`` takes them from the weights, as if inputs
were white; ``calibration.moments`` takes them from text that runs through the layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .heads import HeadWeights, group_owners


@dataclass(frozen=True)
class Moments:
    """Second moments of what one layer computes, for one way to group its heads.

    Attributes:
        query: E[q_h q_hᵀ], (H, D, D) float64, before any rotation.
        key, value: of the stacked KV heads of each group, each (m·D, m·D) float64.
        attended: of the values of a group's KV heads as each query head's own attention mixes them, for each group
            (n, m·D, m·D) float64; None without text.
    """

    query: torch.Tensor
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    attended: list[torch.Tensor] | None = None


@dataclass(frozen=True)
class LayerStatistics:
    """All that solving a layer needs: its weights, and moments for one way to group its heads.

    Attributes:
        weights: of the original layer.
        moments: for the grouping that is solved.
    """

    weights: HeadWeights
    moments: Moments


def weight_statistics(weights: HeadWeights, order: tuple[int, ...], groups: int) -> LayerStatistics:
    """Statistics from the weights alone: what the moments would be if inputs were white (C = I).

    Args:
        weights: of the original layer.
        order: of query heads; group g takes the g-th run of them.
        groups: the number of groups.
    """

    def augmented(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        # A bias is one more input, which is always 1.
        wide = weight.double()
        return wide if bias is None else torch.cat([wide, bias.double().unsqueeze(-1)], dim=-1)

    query = augmented(weights.query, weights.query_bias)
    found: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
    for _, distinct, _ in group_owners(order, len(weights.key), groups):
        index = torch.tensor(distinct)
        for name, parts in found.items():
            bias = getattr(weights, f"{name}_bias")
            stack = augmented(getattr(weights, name)[index], None if bias is None else bias[index]).flatten(0, 1)
            parts.append(stack @ stack.T)
    return LayerStatistics(weights, Moments(query @ query.mT, found["key"], found["value"]))


def ungrouped_statistics(weights: HeadWeights) -> LayerStatistics:
    """``weight_statistics`` of all heads as one group in their own order: what any grouping is judged by."""
    return weight_statistics(weights, tuple(range(len(weights.query))), 1)
