"""From what is known of a layer to the sharing of every group: each method applied to keys and to values."""

from __future__ import annotations

import torch

from ..layout.types import AttentionLayer
from ..merge import Sharing, low_rank, pooled, procrustes, rotary_low_rank, rotary_procrustes
from .heads import HeadWeights, group_owners
from .moments import Moments


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
