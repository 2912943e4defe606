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
        key, value: of all KV heads stacked, (KV·D, KV·D).
        attended: per query head, of the values of its group's KV heads as the head's own attention mixes them: for each
            group (n, m·D, m·D); None where no text was seen.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    attended: list[torch.Tensor] | None = None


def weight_moments(weights: HeadWeights) -> Moments:
    """What the moments would be if inputs were white: no text is needed (C = I). A bias is one more input of 1."""

    def augmented(weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = weight.double()
        return wide if bias is None else torch.cat([wide, bias.double().unsqueeze(-1)], dim=-1)

    query = augmented(weights.query, weights.query_bias)
    key = augmented(weights.key, weights.key_bias).flatten(0, 1)
    value = augmented(weights.value, weights.value_bias).flatten(0, 1)
    return Moments(query @ query.mT, key @ key.T, value @ value.T)


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
    for members, distinct, owner in group_owners(order, layer.num_key_value_heads, groups):
        grams = moments.query[torch.tensor(members)]
        own = _block(moments.key, distinct, layer.head_dim)
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
        seen = moments.attended[g] if moments.attended is not None else _block(moments.value, distinct, layer.head_dim)
        found.append((low_rank if method == "lowrank" else procrustes)(grams, seen, owner))
    return found


def _block(moments: torch.Tensor, heads: list[int], D: int) -> torch.Tensor:
    index = torch.cat([torch.arange(head * D, (head + 1) * D) for head in heads])
    return moments[index][:, index]
