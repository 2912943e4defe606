"""Low-rank sharing: the best head of D rows that a group can share, where nothing rotates it.

Values always; keys without RoPE. With one metric for all heads the optimum is a truncated eigenvalue problem
(Eckart and Young 1936); with a metric for each head it is found by alternating least squares from there. Derivation:
docs/methods.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .sharing import Sharing, best_restore, error, pooled

# Alternations end when one improves the error by less than this share.
_TOLERANCE = 1e-3


def low_rank(grams: torch.Tensor, moments: torch.Tensor, owner: Sequence[int], *, rounds: int = 20) -> Sharing:
    """Minimise Σ_h tr[Γ_h (E_h - N_h R) K_h (E_h - N_h R)ᵀ] over R and N.

    Args:
        grams: Γ, (n, D, D), symmetric positive semidefinite.
        moments: K, (m·D, m·D) for the closed form, or (n, m·D, m·D) for a metric of each query head's own.
        owner: for each query head the index of its KV head among the m.
        rounds: alternations at most, with a metric for each head.

    Returns:
        The sharing; for one metric a global minimum. With m = 1 it is exact.
    """
    grams, moments = grams.double(), moments.double()
    common = moments if moments.ndim == 2 else moments.mean(0)
    n, D, _ = grams.shape
    if common.shape[0] == D:
        return pooled(n, 1, D, owner)
    roots = square_root(grams)
    # T stacks Γ_h^{1/2} E_h: T B x is what the errors are measured on, and U its top left singular vectors.
    T = _placed(roots, owner, common.shape[0])
    _, vectors = torch.linalg.eigh(T @ common @ T.T)
    reduce = _orthonormal_rows(vectors[:, -D:].T @ T, common)
    sharing = Sharing(reduce, best_restore(reduce, moments, owner))
    if moments.ndim == 2:
        return sharing
    last = error(sharing, grams, moments, owner)
    inverse = _inverse(common)
    for _ in range(rounds):
        reduce = _orthonormal_rows(_best_reduce(sharing, grams, moments, owner, inverse), common)
        candidate = Sharing(reduce, best_restore(reduce, moments, owner))
        now = error(candidate, grams, moments, owner)
        if now >= last:
            break
        sharing, improved = candidate, (last - now) / max(last, 1e-300)
        last = now
        if improved < _TOLERANCE:
            break
    return sharing


def square_root(matrices: torch.Tensor) -> torch.Tensor:
    """Symmetric square roots of positive semidefinite matrices, (…, D, D)."""
    values, vectors = torch.linalg.eigh(matrices)
    return (vectors * values.clamp(min=0).sqrt().unsqueeze(-2)) @ vectors.mT


def _placed(blocks: torch.Tensor, owner: Sequence[int], width: int) -> torch.Tensor:
    """Rows of blocks (n, D, D), each in the columns of its KV head: (n·D, width)."""
    n, D, _ = blocks.shape
    out = blocks.new_zeros(n, D, width)
    for h, place in enumerate(owner):
        out[h, :, place * D : (place + 1) * D] = blocks[h]
    return out.reshape(n * D, width)


def _orthonormal_rows(reduce: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """The same span with rows of unit, uncorrelated output: well scaled for low-precision caches.

    Rows that carry nothing are scaled as the strongest row is.
    """
    values, vectors = torch.linalg.eigh(reduce @ moments @ reduce.T)
    values = torch.where(values > values[-1] * 1e-12, values, values[-1])
    scale = torch.where(values > 0, values, torch.ones_like(values)).rsqrt()
    # Mean square of the original rows, so that the shared head is as large as the heads that it replaces.
    size = (moments.diagonal().mean().clamp(min=0)).sqrt()
    return (scale.unsqueeze(-1) * vectors.T @ reduce) * torch.where(size > 0, size, torch.ones_like(size))


def _best_reduce(
    sharing: Sharing,
    grams: torch.Tensor,
    moments: torch.Tensor,
    owner: Sequence[int],
    inverse: torch.Tensor,
    steps: int = 8,
) -> torch.Tensor:
    """Improve R for given N by conjugate gradients on Σ_h N_hᵀΓ_h N_h R K_h = Σ_h N_hᵀ Γ_h E_h K_h.

    Preconditioned by the left side as it would be if all heads had one metric, (Σ N_hᵀΓ_h N_h) R K; ``inverse`` is that
    of K. A few steps come close enough for a round: N changes after it.
    """
    N, D = sharing.restore, sharing.reduce.shape[0]
    left = N.mT @ grams
    inner = left @ N
    own = torch.stack([moments[h, place * D : (place + 1) * D] for h, place in enumerate(owner)])
    target = (left @ own).sum(0)
    before = _inverse(inner.sum(0))

    def apply(R: torch.Tensor) -> torch.Tensor:
        return (inner @ (R @ moments)).sum(0)

    R = sharing.reduce
    residual = target - apply(R)
    direction = turned = before @ residual @ inverse
    size = (residual * turned).sum()
    stop = size * 1e-12
    for _ in range(steps):
        if size <= stop:
            break
        product = apply(direction)
        curvature = (direction * product).sum()
        if curvature <= 0:
            break
        step = size / curvature
        R = R + step * direction
        residual = residual - step * product
        turned = before @ residual @ inverse
        new = (residual * turned).sum()
        direction, size = turned + new / size * direction, new
    return R


def _inverse(matrix: torch.Tensor) -> torch.Tensor:
    """Of a positive semidefinite matrix, for a preconditioner: directions that carry next to nothing stay small."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = (values[-1] * 1e-6).clamp(min=1e-300)
    return (vectors / values.maximum(floor)) @ vectors.mT
