"""Masks and biases as PyTorch's ``scaled_dot_product_attention`` takes them."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def addable(extra: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask or bias in a dtype that SDPA accepts with queries of ``dtype``: bool, float32 or ``dtype``."""
    if extra.dtype in (torch.bool, dtype):
        return extra
    return extra.to(torch.float64 if dtype == torch.float64 else torch.float32)


def sum_of_extras(visible: Tensor | None, extras: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of masks and biases, in four dimensions; bool if all of them are bool.

    Args:
        visible: None, or bool of four dimensions: the keys that positions allow to see.
        extras: masks and biases of four dimensions, or None.
    """
    total = None
    for extra in extras:
        if extra is None:
            continue
        if extra.dtype == torch.bool:
            visible = extra if visible is None else visible & extra
        else:
            total = extra if total is None else total.to(torch.promote_types(total.dtype, torch.float32)) + extra
    if total is None or visible is None:
        return visible if total is None else total
    return torch.where(visible, total, float("-inf"))
