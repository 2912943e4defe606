"""The residual energy of sharing: the least error that any shared head leaves, from eigenvalues alone.

What is lost by keeping D of the directions that a group spans is the sum of the eigenvalues that are not kept (Eckart
and Young 1936), so neither R nor N has to be found. The metrics are those of ``low_rank`` and ``rotary_low_rank``, and
the figures what ``error`` says of their sharings.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

from .lowrank import square_root
from .rotary import Pairs, pair_moments, pair_weights, weights_of_places

# Matrices that are diagonalised at a time; what is made on the way is about four times as large.
_CHUNK_BYTES = 32 << 20


def linear_residual(grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int]) -> tuple[float, float]:
    """The least Σ_h tr[Γ_h (E_h - N_h R) K (E_h - N_h R)ᵀ] over R and N, where nothing rotates the heads.

    With T the stack of Γ_h^{1/2} E_h it is the sum of all but the D largest eigenvalues of T K Tᵀ (Eckart and Young
    1936). TᵀT is block diagonal, with A = Σ Γ_h over the query heads of each KV head, so those of A^{1/2} K A^{1/2},
    (m·D, m·D), are the same: that problem is the smaller one where query heads have a KV head in common.

    Args:
        grams: Γ, (n, D, D), any floating dtype.
        moments: K, (m·D, m·D), the same for all heads.
        owner: for each query head the index of its KV head among the m.

    Returns:
        What is lost, and the energy of sharing nothing, tr T K Tᵀ; both computed in float64. With m = 1 nothing is
        lost.
    """
    moments = moments.double()
    D = grams.shape[-1]
    m = moments.shape[0] // D
    with _one_thread():
        roots = square_root(_summed(grams, owner, m))
        left = (roots @ moments.view(m, D, m * D)).view(m * D, m * D)
        weighted = (roots @ left.T.reshape(m, D, m * D)).view(m * D, m * D)
        values = torch.linalg.eigvalsh(weighted).clamp(min=0)
    return float(values[:-D].sum()), float(values.sum())


def rotary_residual(
    grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], *, pairs: Pairs, dim: int
) -> tuple[float, float]:
    """The least error of a shared key under RoPE: the mean squared error of scores over all relative positions.

    For a pair f with z_h the keys as complex numbers and w_h = E|q_h,f|² it is half of all but the largest eigenvalue
    of D_√w E[z zᴴ] D_√w. Half, because the real part of a number that turns has half its power; what a partial rotary
    factor leaves unrotated counts in full, as in ``linear_residual``.

    Args:
        grams: E[q_h q_hᵀ], (n, D, D), of unrotated queries, any floating dtype.
        moments: second moment of the stacked unrotated keys, (m·D, m·D).
        owner: for each query head the index of its KV head.
        pairs, dim: how and how far RoPE rotates.

    Returns:
        What is lost, and the energy of sharing nothing; both computed in float64.
    """
    grams, moments = grams.double(), moments.double()
    D = grams.shape[-1]
    m = moments.shape[0] // D
    root = weights_of_places(pair_weights(grams, pairs, dim), owner, m).sqrt()
    weighted = root.unsqueeze(-1) * pair_moments(moments, D, pairs, dim) * root.unsqueeze(-2)
    values = torch.linalg.eigvalsh(weighted).clamp(min=0) / 2
    lost, total = float(values[:, :-1].sum()), float(values.sum())
    if dim < D:
        rest = linear_residual(*_unrotated(grams, moments, dim), owner)
        lost, total = lost + rest[0], total + rest[1]
    return lost, total


def pair_residuals(grams: torch.Tensor, moments: torch.Tensor, rotary: tuple[Pairs, int] | None = None) -> torch.Tensor:
    """What any two KV heads lose when they share one, as a share of their energy.

    Half is the most: of two heads, the better half of all directions can be kept.

    Args:
        grams: Γ summed over the query heads that own each KV head, (G, D, D), any floating dtype.
        moments: K of all KV heads stacked, (G·D, G·D).
        rotary: pairs and dim (see ``rotary_residual``), or None where nothing rotates.

    Returns:
        (G, G) float64, symmetric, between 0 and 1/2; 0 on the diagonal and for two heads without energy.
    """
    grams, moments = grams.double(), moments.double()
    G, D, _ = grams.shape
    with _one_thread():
        if rotary is None:
            lost, total = _linear_pairs(grams, moments)
        else:
            pairs, dim = rotary
            lost, total = _rotary_pairs(pair_weights(grams, pairs, dim), pair_moments(moments, D, pairs, dim))
            if dim < D:
                rest = _linear_pairs(*_unrotated(grams, moments, dim))
                lost, total = lost + rest[0], total + rest[1]
    share = torch.where(total > 0, lost / total.clamp(min=1e-300), torch.zeros_like(lost))
    first, second = torch.triu_indices(G, G, 1)
    table = moments.new_zeros(G, G)
    table[first, second] = table[second, first] = share
    return table


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Eigenvalues on one thread: several wait for each other so often that a busy machine takes ten times as long."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _linear_pairs(grams: torch.Tensor, moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lost and total of every pair a < b, (G·(G-1)/2,) each, in the order of ``triu_indices``."""
    G, D, _ = grams.shape
    blocks = moments.view(G, D, G, D)
    roots = square_root(grams)

    def weighted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # Indices on both sides of a slice come first: (pairs, D, D).
        return roots[a] @ blocks[a, :, b] @ roots[b]

    own = weighted(torch.arange(G), torch.arange(G))
    lost, total = [moments.new_zeros(0)], [moments.new_zeros(0)]
    size = max(1, _CHUNK_BYTES // (8 * (2 * D) ** 2))
    for a, b in zip(*(index.split(size) for index in torch.triu_indices(G, G, 1)), strict=True):
        # The lower triangle is all that eigenvalues are computed from.
        matrix = moments.new_zeros(len(a), 2 * D, 2 * D)
        matrix[:, :D, :D], matrix[:, D:, D:] = own[a], own[b]
        matrix[:, D:, :D] = weighted(b, a)
        values = torch.linalg.eigvalsh(matrix).clamp(min=0)
        lost.append(values[:, :D].sum(-1))
        total.append(values.sum(-1))
    return torch.cat(lost), torch.cat(total)


def _rotary_pairs(weights: torch.Tensor, hermitian: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Likewise under RoPE, from weights (F, G) and moments (F, G, G): the matrices are 2 by 2."""
    a, b = torch.triu_indices(hermitian.shape[-1], hermitian.shape[-1], 1)
    weights = weights.clamp(min=0)
    own = weights * hermitian.diagonal(dim1=1, dim2=2).real.clamp(min=0)
    first, second = own[:, a], own[:, b]
    cross = weights[:, a] * weights[:, b] * hermitian[:, a, b].abs().square()
    both = first + second
    largest = (both + ((first - second).square() + 4 * cross).sqrt()) / 2
    # The determinant over the larger root: their difference would be nothing but rounding where heads are alike.
    smallest = (first * second - cross).clamp(min=0) / largest.clamp(min=1e-300)
    return smallest.sum(0) / 2, both.sum(0) / 2


def _summed(grams: torch.Tensor, owner: Sequence[int], m: int) -> torch.Tensor:
    """Γ summed over the query heads of each KV head, (m, D, D) float64."""
    grams = grams.double()
    return grams.new_zeros(m, *grams.shape[1:]).index_add_(0, torch.tensor(owner), grams)


def _unrotated(grams: torch.Tensor, moments: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Grams and moments of the dimensions from ``dim`` on."""
    D = grams.shape[-1]
    m = moments.shape[0] // D
    blocks = moments.view(m, D, m, D)[:, dim:, :, dim:]
    return grams[:, dim:, dim:], blocks.reshape(m * (D - dim), m * (D - dim))
