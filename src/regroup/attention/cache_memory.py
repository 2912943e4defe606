"""Checks of the states that a cache gets, and the memory blocks that they are written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import RegroupError
from .autocast import lowered
from .checks import whole_number


def checked_length(max_length: Any) -> int | None:
    """``max_length`` as a Python number, or None.

    Raises:
        RegroupError: it is not a whole number, or less than 1.
    """
    if max_length is None:
        return None
    length = whole_number(max_length)
    if length is None or length < 1:
        raise RegroupError("the cache would hold no tokens", expected="max_length of 1 or more", got=repr(max_length))
    return length


def checked_states(key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
    """New states in the dtype in which attention will read them.

    Raises:
        RegroupError: keys and values do not match.
    """
    for name, states in (("key", key_states), ("value", value_states)):
        if not isinstance(states, Tensor) or states.dim() != 4:
            raise RegroupError(
                f"the {name} states must have four dimensions",
                tensor=name,
                expected="(batch, KV heads, tokens, width)",
                got=tuple(states.shape) if isinstance(states, Tensor) else type(states).__name__,
            )
    if key_states.shape[:3] != value_states.shape[:3]:
        raise RegroupError(
            "the key and value states differ in batch, KV heads or tokens",
            tensor="value",
            expected=tuple(key_states.shape[:3]),
            got=tuple(value_states.shape[:3]),
        )
    return lowered(key_states), lowered(value_states)


def kinds_of(pair: tuple[Tensor, Tensor], *, dtypes: bool = False) -> list[tuple[Any, ...]]:
    """The properties that new states share with the blocks that they are written to: all but tokens and dtype."""
    return [(*each.shape[:2], each.shape[3], each.device, each.dtype if dtypes else None) for each in pair]


def common_dtype(one: Tensor, other: Tensor) -> torch.dtype:
    return torch.promote_types(one.dtype, other.dtype)


def widened(block: Tensor, states: Tensor, length: int) -> Tensor:
    """The block in a dtype that can also represent these states."""
    dtype = common_dtype(block, states)
    return block if dtype == block.dtype else longer(block, block.shape[2], length, dtype)


def form_of(pair: tuple[Tensor, Tensor]) -> str:
    key, _ = pair
    dtypes = dict.fromkeys(str(each.dtype).removeprefix("torch.") for each in pair)
    widths = dict.fromkeys(str(each.shape[3]) for each in pair)
    return (
        f"batch {key.shape[0]}, {key.shape[1]} KV heads of {' and '.join(widths)}, {' and '.join(dtypes)}, {key.device}"
    )


def new_block(like: Tensor, capacity: int, dtype: torch.dtype | None = None) -> Tensor:
    shape = (*like.shape[:2], capacity, like.shape[3])
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)
    with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside of it
        return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def longer(block: Tensor, capacity: int, length: int, dtype: torch.dtype | None = None) -> Tensor:
    new = new_block(block, capacity, dtype)
    new[:, :, :length] = block[:, :, :length]
    return new
