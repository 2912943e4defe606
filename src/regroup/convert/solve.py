"""From what is known of a layer to the sharing of every group: each method applied to keys and to values."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..layout.types import AttentionLayer
from ..merge import Sharing, low_rank, pooled, procrustes, rotary_low_rank, rotary_procrustes
from .heads import HeadWeights, group_owners


@dataclass(frozen=True)
class Moments:
    """Second moments of what one layer computes.

    Attributes:
        query: E[q_h q_hᵀ], (H, D, D), before any rotation.
        key, value: of the KV heads of each group stacked: for each group (m·D, m·D).
        attended: per query head, of the values of its group's KV heads as the head's own attention mixes them: for each
            group (n, m·D, m·D); None where no text was seen.
    """

    query: torch.Tensor
    key: list[torch.Tensor]
    value: list[torch.Tensor]
    attended: list[torch.Tensor] | None = None


def weight_moments(weights: HeadWeights, order: tuple[int, ...], groups: int) -> Moments:
    """What the moments would be if inputs were white: no text is needed (C = I). A bias is one more input of 1."""

    def augmented(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
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
    return Moments(query @ query.mT, found["key"], found["value"])


def solve_keys(
    method: str, layer: AttentionLayer, moments: Moments, order: tuple[int, ...], groups: int
) -> list[Sharing]:
    """A sharing of the keys for each group.

    Args:
        method: ``"mean"``, ``"procrustes"`` or ``"lowrank"``.
        layer: of the parent.
        moments: of the layer.
        order: of query heads.
        groups: G of the child.
    """
    found = []
    for g, (members, distinct, owner) in enumerate(group_owners(order, layer.num_key_value_heads, groups)):
        grams = moments.query[torch.tensor(members)]
        own = moments.key[g]
        if method == "mean":
            found.append(pooled(len(members), len(distinct), layer.head_dim, owner))
        elif layer.rotary is None:
            found.append((low_rank if method == "lowrank" else procrustes)(grams, own, owner))
        else:
            rule = rotary_low_rank if method == "lowrank" else rotary_procrustes
            found.append(rule(grams, own, owner, pairs=layer.rotary.pairs, dim=layer.rotary.dim))
    return found


def solve_values(
    method: str, layer: AttentionLayer, weights: HeadWeights, moments: Moments, order: tuple[int, ...], groups: int
) -> list[Sharing]:
    """A sharing of the values for each group; ``"lowrank"`` measures errors as each head attends, where that is known.

    Arguments as ``solve_keys``; ``weights`` are the parent's.
    """
    found = []
    output = weights.output.double()
    for g, (members, distinct, owner) in enumerate(group_owners(order, layer.num_key_value_heads, groups)):
        if method == "mean":
            found.append(pooled(len(members), len(distinct), layer.head_dim, owner))
            continue
        W = output[torch.tensor(members)]
        grams = W @ W.mT
        seen = moments.value[g] if moments.attended is None else moments.attended[g]
        found.append((low_rank if method == "lowrank" else procrustes)(grams, seen, owner))
    return found
