"""PyTorch's FlexAttention (Dong et al. 2024): window, soft cap, bias and mask inside a kernel compiled for the call.

For long queries on GPUs, where no fused kernel of PyTorch's SDPA supports these. On a CPU it is used only by name: it
compiles for tens of seconds, has no gradients there, and reads a KV head once per query head of its group, so that it
is slower than the packed backend.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from ..call import Call
from ..decoding import decodes
from ..registry import Backend, Preference, register

# GPUs have no matrix instructions for smaller head_dim.
_LEAST_WIDTH = 16


def unsupported_reason(call: Call) -> str | None:
    """The reason why FlexAttention cannot serve a call, or None."""
    device = call.query.device.type
    if device not in ("cuda", "cpu"):
        return f"FlexAttention is for CUDA and CPU; the tensors are on {device}"
    if device == "cpu" and call.needs_grad:
        return "FlexAttention has no gradients on a CPU"
    if call.dropout:
        return "FlexAttention has no dropout"
    if call.query.dtype == torch.float64:
        return "FlexAttention supports 16 and 32 bits"
    if call.learns_scores:
        return "the gradient of a mask or bias has not been verified through FlexAttention"
    if device == "cuda" and min(call.head_dim, call.value_dim) < _LEAST_WIDTH:
        return f"FlexAttention needs a head_dim of at least {_LEAST_WIDTH}"
    return None


@functools.cache
def _compiled() -> Callable[..., Any]:
    return torch.compile(flex_attention)


@functools.lru_cache(maxsize=32)
def _blocks(queries: int, keys: int, is_causal: bool, window: int | None, device: torch.device) -> BlockMask | None:
    """The blocks of keys that positions allow each block of queries to see, for all heads and sequences."""
    if not is_causal and window is None:
        return None
    shift = keys - queries

    def visible_at(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        visible = column <= row + shift if is_causal else column >= 0
        return visible if window is None else visible & (column > row + (shift - window))

    return create_block_mask(visible_at, None, None, queries, keys, device=device)


def _change(call: Call) -> Callable[..., Tensor] | None:
    """The function that changes the score at (batch, head, query, key), or None."""
    extras = [extra for extra in (call.bias, call.mask) if extra is not None]
    if call.softcap is None and not extras:
        return None
    softcap = call.softcap

    def at(extra: Tensor, *place: Tensor) -> Tensor:
        return extra[tuple(index if size > 1 else 0 for index, size in zip(place, extra.shape, strict=True))]

    def change(score: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        for extra in extras:
            value = at(extra, batch, head, row, column)
            score = torch.where(value, score, float("-inf")) if extra.dtype == torch.bool else score + value
        return score

    return change


def run(call: Call) -> Tensor:
    """Attention by FlexAttention, compiled for each new form of call.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    attend = flex_attention if torch.compiler.is_compiling() else _compiled()
    blocks = _blocks(call.query_length, call.context, call.is_causal, call.window, call.query.device)
    out = attend(
        call.query,
        call.key,
        call.value,
        score_mod=_change(call),
        block_mask=blocks,
        scale=call.scale,
        enable_gqa=call.group > 1,
    )
    return out.to(call.query.dtype)


register(
    Backend(
        name="flex",
        preferences=(
            Preference(
                20,
                lambda call: not call.any_size and not decodes(call) and call.query.device.type == "cuda",
                "prefill on a GPU that PyTorch's SDPA does not support",
            ),
        ),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred=(
            "it could, but is for long queries on GPUs; it compiles for each form of call, and is slower on CPUs"
        ),
    )
)
