"""Uniform numbers of each text's own, and tokens drawn with them: what else is in a batch changes no text."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def uniform(seed: int, stream: str, number: int, count: int) -> Tensor:
    """(count,) float64 in [0, 1) for text ``number`` of a stream; longer texts begin with the same numbers."""
    digest = hashlib.sha256(f"{seed}/{stream}/{number}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def draw(logits: Tensor, numbers: Tensor, allowed: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Draw one token per row by inverting the cumulative distribution.

    Args:
        logits: (n, V), any floating dtype.
        numbers: (n,) float64 in [0, 1).
        allowed: (V,) bool.
        temperature: the logits are divided by it.

    Returns:
        (n,) int64 tokens, all allowed and of positive probability, and (n,) bool: whether the logits were numbers that
        make a distribution. Where they were not, the token means nothing.
    """
    wide = logits.to(torch.float64 if logits.dtype == torch.float64 else torch.float32)
    wide = wide.masked_fill(~allowed, -torch.inf) / temperature
    # Sums of float32 over a large vocabulary would round small probabilities away.
    sums = (wide - wide.amax(-1, keepdim=True)).exp().cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    # Rounding may not reach the total, behind which there is no token.
    target = torch.minimum(numbers[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(sums, target, right=True)[:, 0]
    return token.clamp_(max=logits.shape[-1] - 1), total[:, 0].isfinite()
