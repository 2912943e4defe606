"""The paper's three ways to make one KV head of several (Ainslie et al. 2023, section 2.1 and Figure 4)."""

from __future__ import annotations

import torch


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype to merge in.

    The sum of n equal numbers and its n-th part are exact when the wider format has log2(n) spare bits: float32 gives
    16-bit formats at least 13, float64 gives float32 29.
    """
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else torch.float64


def mean(heads: torch.Tensor) -> torch.Tensor:
    """Mean-pool the heads of one group: the paper's choice.

    Args:
        heads: (n, head_dim, …), any floating dtype; a head that counts twice is there twice.

    Returns:
        (head_dim, …), in the same dtype, rounded once.
    """
    wide = torch.zeros(heads.shape[1:], dtype=accumulator(heads.dtype))
    # Nothing wider to add float64 in: there the differences from one head are added, which equal heads have none of.
    base = heads[0] if wide.dtype == heads.dtype else None
    # One head at a time: the wide copy of a whole group would be the largest thing in memory.
    for head in heads:
        wide += head if base is None else head - base
    wide /= len(heads)
    return wide.to(heads.dtype) if base is None else base + wide


def first(heads: torch.Tensor) -> torch.Tensor:
    """Keep the group's first head. (n, head_dim, …) to (head_dim, …), bit for bit."""
    return heads[0].clone()


def random(heads: torch.Tensor, *, std: float, generator: torch.Generator) -> torch.Tensor:
    """Forget the heads and draw fresh ones, as at the start of pre-training: the ablation's lower bound.

    Args:
        heads: (n, head_dim, …): only shape and dtype are used.
        std: of the normal distribution.
        generator: seeded by the caller, so that the result does not depend on the order of tensors.
    """
    drawn = torch.empty(heads.shape[1:], dtype=torch.float32).normal_(0.0, std, generator=generator)
    return drawn.to(heads.dtype)
