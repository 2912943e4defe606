"""What the decoding kernels share: which calls are decoding, and the signature of their operators."""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call
from .sizes import is_exported, is_fixed

# With more queries attention is bound by arithmetic, not by reading the KV heads: prefill.
MAX_QUERIES = 64
# Bytes of keys and values below which a compiled CPU kernel gains nothing.
_CPU_BYTES = 1 << 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, bool, float, int | None, float | None]


def unsupported_reason(call: Call) -> str | None:
    """The reason why no decoding kernel can serve a call, or None."""
    if call.query.dtype not in _DTYPES:
        return f"{call.query.dtype} is not supported"
    if call.dropout:
        return "the kernel has no dropout"
    if call.needs_grad:
        return "gradients are needed, and the kernel has none"
    if call.query_length > MAX_QUERIES:
        return f"{call.query_length} queries are more than {MAX_QUERIES}, and the kernel is for decoding"
    return None


def decodes(call: Call) -> bool:
    """Whether a call of known sizes has few queries: decoding."""
    return not call.any_size and call.query_length <= MAX_QUERIES


def decodes_without_grad(call: Call, device: str) -> bool:
    """Whether the call decodes on a device without gradients, and is large enough for a kernel."""
    if not decodes(call) or call.query.device.type != device or call.needs_grad:
        return False
    heads = call.batch * call.num_key_value_heads
    nbytes = heads * call.context * (call.head_dim + call.value_dim) * call.key.element_size()
    return device != "cpu" or nbytes >= _CPU_BYTES


def decodes_any_length(call: Call) -> bool:
    """Whether a graph for any length, which stays in this process, decodes without gradients."""
    return call.any_size and not is_exported() and is_fixed(call.query_length) and not call.needs_grad


def arguments(call: Call) -> Arguments:
    """The fields of a call in the order of an operator's arguments, which cannot be a dataclass."""
    arrays = (call.query, call.key, call.value, call.mask, call.bias)
    return *arrays, call.is_causal, call.scale, call.window, call.softcap


def result_of(query: Tensor, key: Tensor, value: Tensor, *_: object) -> Tensor:
    """An uninitialised result of an operator: (B, H, T, Dv) in the query's dtype."""
    return query.new_empty((*query.shape[:3], value.shape[3]))


def strides_of(tensor: Tensor | None) -> tuple[int, ...]:
    """Strides of a mask or bias of four dimensions, in elements; 0 for dimensions that broadcast."""
    if tensor is None:
        return (0, 0, 0, 0)
    return tuple(0 if size == 1 else step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
