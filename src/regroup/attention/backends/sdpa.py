"""PyTorch's ``scaled_dot_product_attention``, for calls that one call of it computes without copies of the KV heads.

The conditions are those of PyTorch's sources (aten/src/ATen/native/transformers, version 2.13): its fused kernels need
the same width of key and value, a mask without gradient, and on GPUs equal head counts or no mask. Otherwise it falls
back, without a warning, to code that repeats the KV heads in memory. This backend does not serve such calls.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..call import Call
from ..decoding import decodes
from ..masks import addable
from ..registry import Backend, Preference, register

# Largest head_dim of FlashAttention on GPUs.
_FLASH_WIDTH = 256


def _repeat_reason(call: Call, masked: bool) -> str | None:
    """The reason why PyTorch would repeat the KV heads of this call, or None."""
    if call.group == 1:
        return None
    if call.value_dim != call.head_dim:
        return "the value has another width than the key: PyTorch repeats the KV heads in memory"
    if call.query.device.type == "cpu":
        if any(tensor.stride(-1) != 1 for tensor in (call.query, call.key, call.value)):
            return "a last dimension is not contiguous: PyTorch repeats the KV heads in memory"
        return None
    if masked:
        return "with a mask, and fewer KV heads than query heads, PyTorch repeats the KV heads in memory"
    if call.query.dtype not in (torch.float16, torch.bfloat16) or call.head_dim > _FLASH_WIDTH:
        return "grouped heads on GPUs need 16 bits and head_dim of 256 at most: PyTorch repeats the KV heads in memory"
    return None


def unsupported_reason(call: Call) -> str | None:
    """The reason why one call of SDPA cannot serve a call, or None."""
    if call.dropout:
        return "SDPA falls back to unfused code for dropout: the dense backend serves it"
    if call.softcap is not None:
        return "SDPA has no soft cap"
    if call.mask is not None and call.bias is not None:
        return "SDPA accepts one mask: the sum of mask and bias would be as large as all scores"
    if call.learns_scores:
        return "SDPA falls back to unfused code for a trained mask or bias"
    length = call.query_length
    if call.hides_by_window(0, length):
        return "SDPA has no window"
    masked = call.mask is not None or call.bias is not None
    if call.is_causal:
        if length != call.context:
            return f"SDPA aligns the first query with the first key; there are {length} queries and {call.context} keys"
        if masked:
            return "SDPA accepts a mask or is_causal, not both"
    return _repeat_reason(call, masked)


def run(call: Call) -> Tensor:
    """One call of ``scaled_dot_product_attention``, with ``enable_gqa`` if heads are shared.

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
    """Whether there are many queries, or causal queries for all keys."""
    if call.any_size:
        return False
    return not decodes(call) or (call.is_causal and call.query_length == call.context > 1)


register(
    Backend(
        name="sdpa",
        preferences=(Preference(30, _is_prefill, "prefill that one call of PyTorch's fused kernel serves"),),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could, but reads a KV head once per query head, which is slow for few queries",
    )
)
