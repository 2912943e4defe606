"""What the kernels for decoding share: calls that none of them serves, and the form of their operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call

# Query positions: beyond them attention is a matrix product for which there are better kernels.
MAX_QUERIES = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, float, int | None, float | None]


def unserved(call: Call) -> str | None:
    """Why no kernel for decoding can serve a call, or None."""
    if call.query.dtype not in _DTYPES:
        return f"{call.query.dtype} is not served"
    if call.dropout:
        return "the kernel has no dropout"
    if call.needs_grad:
        return "gradients are needed, and the kernel has none"
    if call.query_length > MAX_QUERIES:
        return f"{call.query_length} queries are more than {MAX_QUERIES}: it decodes"
    return None


def arguments(call: Call) -> Arguments:
    """The fields of a call in their order, which is what an operator takes: it knows no dataclasses."""
    arrays = (call.query, call.key, call.value, call.mask, call.bias)
    return *arrays, call.is_causal, call.scale, call.window, call.softcap


def result_of(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """Room for what an operator returns, (B, H, T, Dv) in the query's dtype; nothing is computed."""
    return query.new_empty((*query.shape[:3], value.shape[3]))


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a mask or bias of four dimensions, in elements; what broadcasts has stride 0."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
