"""Masks and biases as PyTorch's ``scaled_dot_product_attention`` takes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def addable(extra: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask or bias in a dtype that SDPA takes beside queries of ``dtype``: bool, float32 or that one."""
    if extra.dtype in (torch.bool, dtype):
        return extra
    return extra.to(torch.float64 if dtype == torch.float64 else torch.float32)


def sum_of_extras(seen: Tensor | None, extras: Iterable[Tensor | None]) -> Tensor | None:
    """All that is added to scores, in four dimensions; bool if there are no numbers.

    Args:
        seen: None, or bool, four dimensions: what positions leave to be seen.
        extras: masks and biases of four dimensions, None among them.
    """
    total = None
    for extra in extras:
        if extra is None:
            continue
        if extra.dtype == torch.bool:
            seen = extra if seen is None else seen & extra
        else:
            total = extra if total is None else total.to(torch.promote_types(total.dtype, torch.float32)) + extra
    if total is None or seen is None:
        return seen if total is None else total
    return torch.where(seen, total, float("-inf"))
