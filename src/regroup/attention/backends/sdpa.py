"""PyTorch's ``scaled_dot_product_attention`` where one call of it is right, and reads each KV head in place.

What PyTorch chooses inside is read from its sources (aten/src/ATen/native/transformers, version 2.13): its fused
kernels want one width of key and value, a mask that takes no gradient, and on GPUs one head count or no mask; otherwise
it falls without a word to a path that repeats the KV heads in memory. Such calls are not for this backend.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..call import Call
from ..decoding import decodes
from ..masks import addable
from ..registry import Backend, Preference, register

# Head width above which FlashAttention on GPUs gives up.
_FLASH_WIDTH = 256


def _repeats(call: Call, masked: bool) -> str | None:
    """Why PyTorch would repeat KV heads for this call, or None."""
    if call.group == 1:
        return None
    if call.value_dim != call.head_dim:
        return "the value's width is unlike the key's: PyTorch repeats the KV heads in memory"
    if call.query.device.type == "cpu":
        if any(tensor.stride(-1) != 1 for tensor in (call.query, call.key, call.value)):
            return "a last dimension has gaps: PyTorch repeats the KV heads in memory"
        return None
    if masked:
        return "with a mask, and fewer KV heads than query heads, PyTorch repeats the KV heads in memory"
    if call.query.dtype not in (torch.float16, torch.bfloat16) or call.head_dim > _FLASH_WIDTH:
        return "grouped heads on GPUs want 16 bits and heads of 256 at most: PyTorch repeats the KV heads in memory"
    return None


def unsupported_reason(call: Call) -> str | None:
    """Why one call of SDPA cannot serve a call, or None if it can."""
    if call.dropout:
        return "dropout is for the dense backend: SDPA falls to unfused code"
    if call.softcap is not None:
        return "SDPA has no soft cap"
    if call.mask is not None and call.bias is not None:
        return "SDPA takes one mask: the sum of mask and bias would be as large as all scores"
    if call.learns_scores:
        return "SDPA falls to unfused code when a mask or bias is trained"
    length = call.query_length
    if call.hides_by_window(0, length):
        return "SDPA has no window"
    masked = call.mask is not None or call.bias is not None
    if call.is_causal:
        if length != call.context:
            return f"SDPA aligns the first query with the first key; here are {length} queries and {call.context} keys"
        if masked:
            return "SDPA takes a mask or is_causal, not both"
    return _repeats(call, masked)


def run(call: Call) -> Tensor:
    """One call of ``scaled_dot_product_attention``, with ``enable_gqa`` where heads are shared.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    first, last = call.span(0, call.query_length)
    extra = call.bias if call.mask is None else call.mask
    if extra is not None:
        extra = extra[..., first:last] if extra.shape[3] > 1 else extra
        extra = addable(extra, call.query.dtype)
        extra = extra.expand(-1, -1, call.query_length, last - first)
    return scaled_dot_product_attention(
        call.query,
        call.key[:, :, first:last],
        call.value[:, :, first:last],
        attn_mask=extra,
        is_causal=call.is_causal,
        scale=call.scale,
        enable_gqa=call.group > 1,
    )


def _is_prefill(call: Call) -> bool:
    """Whether there are many queries, or as many as keys with causality."""
    if call.any_size:
        return False
    return not decodes(call) or (call.is_causal and call.query_length == call.context > 1)


register(
    Backend(
        name="sdpa",
        preferences=(Preference(30, _is_prefill, "prefill that one call of PyTorch's fused kernel serves"),),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could; it reads a KV head once for each query head, which costs where queries are few",
    )
)
