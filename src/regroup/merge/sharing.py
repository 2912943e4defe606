"""One key or value head for a group, and what its query heads absorb: the common form of every linear merge rule.

Notation for one group: n query heads, m distinct original KV heads (m = n for multi-head attention), D head_dim.
``B`` stacks the m heads' projections, (m·D, hidden); query head h used rows ``owner[h]·D`` and the D - 1 after them,
``B_h = E_h B``. A rule gives

    reduce   R  (D, m·D)   the shared head's projection is R B
    restore  N  (n, D, D)  B_h ≈ N_h R B

and queries and outputs absorb N: scores q_hᵀ B_h x ≈ (N_hᵀ q_h)ᵀ R B x, outputs W_o^h B_h x ≈ (W_o^h N_h) R B x.
The error that a rule leaves, in the metric that the caller chooses, is

    Σ_h tr[ Γ_h (E_h - N_h R) K_h (E_h - N_h R)ᵀ ]

with Γ_h (D, D) what head h's error is measured by (W_o^hᵀ W_o^h for values, E[q_h q_hᵀ] for keys) and K_h (m·D, m·D)
the second moment of B x as head h sees it. With K = B Bᵀ no text is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sharing:
    """A group's shared head.

    Attributes:
        reduce: R, (D, m·D) float64.
        restore: N, (n, D, D) float64.
    """

    reduce: torch.Tensor
    restore: torch.Tensor


def owners(kv_heads: Sequence[int]) -> tuple[list[int], list[int]]:
    """The distinct KV heads of a group's query heads in order, and the place of each query head's own among them."""
    distinct = list(dict.fromkeys(kv_heads))
    return distinct, [distinct.index(head) for head in kv_heads]


def error(sharing: Sharing, grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int]) -> float:
    """What a sharing leaves unexplained: Σ_h tr[Γ_h (E_h - N_h R) K_h (E_h - N_h R)ᵀ].

    Args:
        sharing: of any rule.
        grams: Γ, (n, D, D).
        moments: K, (m·D, m·D) for all heads alike or (n, m·D, m·D).
        owner: for each query head the index of its KV head.
    """
    total = 0.0
    for h, gap in enumerate(gaps(sharing, owner)):
        K = moments if moments.ndim == 2 else moments[h]
        total += float(torch.einsum("ij,jk,kl,il->", grams[h].double(), gap, K.double(), gap))
    return total


def gaps(sharing: Sharing, owner: Sequence[int]) -> torch.Tensor:
    """E_h - N_h R for each query head, (n, D, m·D)."""
    D, wide = sharing.reduce.shape
    gap = -(sharing.restore @ sharing.reduce)
    for h, place in enumerate(owner):
        gap[h, :, place * D : (place + 1) * D] += torch.eye(D, dtype=gap.dtype)
    assert gap.shape[-1] == wide
    return gap


def pooled(n: int, m: int, D: int, owner: Sequence[int]) -> Sharing:
    """Mean-pooling as a sharing: R averages over query heads, N does nothing (paper, section 2.1)."""
    weights = torch.bincount(torch.tensor(owner), minlength=m).double() / n
    eye = torch.eye(D, dtype=torch.float64)
    return Sharing(torch.cat([weight * eye for weight in weights], dim=1), eye.expand(n, D, D).clone())


def mean_sharing(grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], **rotation: object) -> Sharing:
    """``pooled`` in the form of a registered method; of the statistics (see ``low_rank``) only the shapes are used."""
    del rotation  # a mean is the same in any basis
    n, D, _ = grams.shape
    return pooled(n, moments.shape[-1] // D, D, owner)


def first_sharing(grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], **rotation: object) -> Sharing:
    """Keep the head of the first query head, as the paper's ablation does, in the form of a registered method."""
    del rotation
    n, D, _ = grams.shape
    eye = torch.eye(D, dtype=torch.float64)
    reduce = torch.zeros(D, moments.shape[-1], dtype=torch.float64)
    reduce[:, owner[0] * D : (owner[0] + 1) * D] = eye
    return Sharing(reduce, eye.expand(n, D, D).clone())


def best_restore(reduce: torch.Tensor, moments: torch.Tensor, owner: Sequence[int]) -> torch.Tensor:
    """The N that is optimal for a given R: least squares, whatever Γ is.

    N_h = E_h K_h Rᵀ (R K_h Rᵀ)⁺. (D, m·D) and (m·D, m·D) or (n, m·D, m·D) to (n, D, D).
    """
    D = reduce.shape[0]
    K = moments.double()
    K = K if K.ndim == 3 else K.expand(len(owner), *K.shape)
    KR = K @ reduce.T
    inverse = torch.linalg.pinv(reduce @ KR, hermitian=True)
    own = torch.stack([KR[h, place * D : (place + 1) * D] for h, place in enumerate(owner)])
    return own @ inverse
