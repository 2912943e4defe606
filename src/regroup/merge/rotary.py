"""Keys that RoPE rotates: only maps that commute with the rotation may be absorbed, one complex number a pair and head.

A pair of dimensions that rotate together is one complex number. ``half`` pairs dimension i with i + d/2 (Llama,
GPT-NeoX), ``interleaved`` 2i with 2i + 1 (Cohere); d is the number of rotated dimensions, the first of the head. What
a partial rotary factor leaves unrotated is shared as in ``lowrank``. Su et al. 2021 for RoPE; docs/methods.md for the
rest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch

from .lowrank import low_rank
from .procrustes import procrustes
from .sharing import Sharing, pooled

Pairs = Literal["half", "interleaved"]
# Hermitian moments (F, m, m), weights (F, n), owner -> reduce (F, m), restore (F, n), all complex.
PairRule = Callable[[torch.Tensor, torch.Tensor, Sequence[int]], tuple[torch.Tensor, torch.Tensor]]


def rotary_low_rank(
    grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], *, pairs: Pairs, dim: int
) -> Sharing:
    """The best shared key under RoPE: Σ_h E|q_h,f|² E|z_h,f - c_h z̃_f|² is least for every pair f.

    Args:
        grams: E[q_h q_hᵀ], (n, D, D), of unrotated queries.
        moments: second moment of the stacked unrotated keys, (m·D, m·D).
        owner: for each query head the index of its KV head.
        pairs, dim: how and how far RoPE rotates.
    """
    return _by_pairs(grams, moments, owner, pairs, dim, _top_eigenvector, low_rank)


def rotary_procrustes(
    grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], *, pairs: Pairs, dim: int
) -> Sharing:
    """Rotate every pair of every head onto the group's mean: |c_h| = 1. Arguments as ``rotary_low_rank``."""
    return _by_pairs(grams, moments, owner, pairs, dim, _rotated_mean, procrustes)


def pair_indices(pairs: Pairs, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Real and imaginary dimensions of each of the dim / 2 pairs."""
    if pairs == "half":
        return torch.arange(dim // 2), torch.arange(dim // 2, dim)
    return torch.arange(0, dim, 2), torch.arange(1, dim, 2)


def pair_moments(moments: torch.Tensor, D: int, pairs: Pairs, dim: int) -> torch.Tensor:
    """E[z_a z̄_b] of every pair for heads a and b, from the real second moments of their dimensions.

    (m·D, m·D) to (F, m, m), complex and Hermitian.
    """
    real, imaginary = pair_indices(pairs, dim)
    m = moments.shape[0] // D
    K = moments.view(m, D, m, D)

    def of(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        return K[:, rows][..., columns].diagonal(dim1=1, dim2=3)

    return torch.complex(of(real, real) + of(imaginary, imaginary), of(imaginary, real) - of(real, imaginary)).permute(
        2, 0, 1
    )


def pair_weights(grams: torch.Tensor, pairs: Pairs, dim: int) -> torch.Tensor:
    """E|q_f|² of every pair, (n, D, D) to (F, n): all that RoPE leaves of a query's second moment."""
    real, imaginary = pair_indices(pairs, dim)
    power = grams.diagonal(dim1=1, dim2=2)
    return (power[:, real] + power[:, imaginary]).T


def weights_of_places(weights: torch.Tensor, owner: Sequence[int], m: int) -> torch.Tensor:
    """Weights of the m keys: query heads with the same key add up theirs. (F, n) to (F, m)."""
    place = torch.tensor(owner)
    return torch.zeros(len(weights), m, dtype=weights.dtype).index_add_(1, place, weights).clamp(min=0)


def _by_pairs(
    grams: torch.Tensor,
    moments: torch.Tensor,
    owner: Sequence[int],
    pairs: Pairs,
    dim: int,
    rule: PairRule,
    rest_rule: Callable[..., Sharing],
) -> Sharing:
    grams, moments = grams.double(), moments.double()
    n, D, _ = grams.shape
    m = moments.shape[0] // D
    if m == 1:
        return pooled(n, m, D, owner)
    a, c = rule(pair_moments(moments, D, pairs, dim), pair_weights(grams, pairs, dim), owner)

    real, imaginary = pair_indices(pairs, dim)
    K = moments.view(m, D, m, D)
    reduce = moments.new_zeros(D, m, D)
    restore = moments.new_zeros(n, D, D)
    _fill(reduce.permute(1, 0, 2), a.T, real, imaginary)
    _fill(restore, c.T, real, imaginary)
    if dim < D:
        rest = torch.arange(dim, D)
        sub = K[:, rest][..., rest].reshape(m * len(rest), m * len(rest))
        plain = rest_rule(grams[:, rest][..., rest], sub, owner)
        reduce[dim:, :, dim:] = plain.reduce.view(len(rest), m, len(rest))
        restore[:, dim:, dim:] = plain.restore
    return Sharing(reduce.reshape(D, m * D), restore)


def _fill(matrices: torch.Tensor, numbers: torch.Tensor, real: torch.Tensor, imaginary: torch.Tensor) -> None:
    """Write multiplication by complex numbers (k, F) into real matrices (k, D, D), in place."""
    matrices[:, real, real] = numbers.real
    matrices[:, imaginary, imaginary] = numbers.real
    matrices[:, real, imaginary] = -numbers.imag
    matrices[:, imaginary, real] = numbers.imag


def _top_eigenvector(
    moments: torch.Tensor, weights: torch.Tensor, owner: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    root = weights_of_places(weights, owner, moments.shape[-1]).sqrt().to(moments.dtype)
    _, vectors = torch.linalg.eigh(root.unsqueeze(-1) * moments * root.unsqueeze(-2))
    a = vectors[..., -1].conj() * root
    return _scaled(a, moments, torch.tensor(owner))


def _rotated_mean(
    moments: torch.Tensor, weights: torch.Tensor, owner: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    place = torch.tensor(owner)
    m = moments.shape[-1]
    counts = torch.bincount(place, minlength=m).to(moments.dtype) / len(owner)
    # Start from the head with the most power: rotations relative to it.
    leader = moments.diagonal(dim1=1, dim2=2).real.argmax(-1)
    unit = _phase(moments[torch.arange(len(moments)), :, leader])
    for _ in range(50):
        before = unit
        unit = _phase((moments @ (unit * counts).unsqueeze(-1)).squeeze(-1))
        if torch.allclose(before, unit, rtol=0, atol=1e-12):
            break
    return unit.conj() * counts, unit[:, place]


def _phase(z: torch.Tensor) -> torch.Tensor:
    size = z.abs()
    return torch.where(size > 0, z / size.clamp(min=1e-300), torch.ones_like(z))


def _scaled(a: torch.Tensor, moments: torch.Tensor, place: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale z̃ = Σ a_h z_h to the mean power of the heads that it replaces, and find the c that is best for it."""
    power = torch.einsum("fh,fhg,fg->f", a, moments, a.conj()).real
    mean = moments.diagonal(dim1=1, dim2=2).real.mean(-1)
    scale = torch.where(power > 0, (mean / power.clamp(min=1e-300)).sqrt(), torch.ones_like(power))
    a = a * scale.unsqueeze(-1)
    cross = torch.einsum("fhg,fg->fh", moments, a.conj())
    own = (power * scale.square()).unsqueeze(-1)
    c = torch.where(own > 0, cross / own.clamp(min=1e-300), torch.zeros_like(cross))
    return a, c[:, place]
