"""Procrustes alignment: rotate every head of a group onto their common mean, then average (the baseline to beat).

For values and unrotated keys the rotation is any orthogonal matrix, under RoPE one phase a pair (``rotary``). Alignment
before pooling: Jin et al., "Align Attention Heads Before Merging Them: An Effective Way for Converting MHA to GQA",
Findings of EMNLP 2025; the iteration is generalised Procrustes analysis (Gower 1975).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .sharing import Sharing, pooled

# Rounds end when one improves the agreement of the heads by less than this share: a further round costs as much as any.
_TOLERANCE = 1e-6


def procrustes(grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], *, rounds: int = 50) -> Sharing:
    """Align the heads of a group by orthogonal matrices and average them.

    Args:
        grams: (n, D, D); only their shape is used: the alignment weighs all directions of a head alike.
        moments: second moment of the stacked heads, (m·D, m·D), or (n, m·D, m·D), of which the mean is taken.
        owner: for each query head the index of its KV head.
        rounds: alternations at most.

    Returns:
        R = [O_1ᵀ | … | O_mᵀ] weighted by query heads, N_h the O of its KV head.
    """
    n, D, _ = grams.shape
    K = (moments if moments.ndim == 2 else moments.mean(0)).double()
    m = K.shape[0] // D
    if m == 1:
        return pooled(n, m, D, owner)
    weights = torch.bincount(torch.tensor(owner), minlength=m).double() / n
    blocks = K.view(m, D, m, D)
    # Start from the head with the most power: rotations relative to it.
    leader = int(blocks.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(-1).argmax())
    turns = _nearest_rotation(blocks[:, :, leader])
    last = -torch.inf
    for _ in range(rounds):
        # W_a C Sᵀ for S = Σ_b w_b O_bᵀ W_b; the nearest orthogonal matrix aligns head a. A head's own share of S turns
        # with it: with that in the sum, a head that has to be reflected would stay where it is.
        for a in range(m):
            others = weights.clone()
            others[a] = 0
            turns[a] = _nearest_rotation(torch.einsum("dbe,b,bef->df", blocks[a], others, turns))
        now = float(torch.einsum("a,adf,adbe,b,bef->", weights, turns, blocks, weights, turns))
        if now - last <= _TOLERANCE * abs(now):
            break
        last = now
    reduce = torch.cat([weight * turn.T for weight, turn in zip(weights, turns, strict=True)], dim=1)
    return Sharing(reduce, turns[torch.tensor(owner)])


def _nearest_rotation(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest orthogonal matrices, reflections among them."""
    left, _, right = torch.linalg.svd(matrices)
    return left @ right
