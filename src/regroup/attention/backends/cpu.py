"""Decoding on a CPU by a compiled kernel: each KV head is read once for all of its query heads, by all threads.

The kernel is ``cpu/decode.cpp``. It is built when it is first needed (``cpu/build.py``); if that is not possible,
:func:`unsupported_reason` returns why, and other backends serve.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from .. import decoding, tracing
from ..call import Call
from ..cpu import build as kernels
from ..decoding import arguments, result_of, strides_of
from ..registry import Backend, Preference, register

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.bool: 3}


class _Call(ctypes.Structure):
    """``RegroupCall`` of decode.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "mask", "bias", "out", "parallel")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "heads", "groups", "queries", "context", "head_dim", "value_dim")
        ),
        *((name, ctypes.c_int64) for name in ("type", "mask_type", "bias_type")),
        *((f"{name}_stride", ctypes.c_int64 * 3) for name in ("query", "key", "value")),
        *((f"{name}_stride", ctypes.c_int64 * 4) for name in ("mask", "bias")),
        *((name, ctypes.c_int64) for name in ("causal", "window", "threads")),
        *((name, ctypes.c_double) for name in ("scale", "softcap")),
    )


def _in_rows(tensor: Tensor) -> bool:
    """Whether the elements of a head are contiguous."""
    return tensor.stride(-1) == 1 or tensor.shape[-1] == 1


def unsupported_reason(call: Call) -> str | None:
    """The reason why the kernel cannot serve a call, or None. Builds the kernel if it supports the call."""
    if call.query.device.type != "cpu":
        return f"the tensors are on {call.query.device.type}, not on the CPU"
    other = decoding.unsupported_reason(call)
    if other is not None:
        return other
    if not _in_rows(call.key) or not _in_rows(call.value):
        return "the last dimension of key or value is not contiguous"
    for name, extra in (("mask", call.mask), ("bias", call.bias)):
        if extra is not None and extra.dtype not in _TYPES:
            return f"a {name} of {extra.dtype} is not supported"
    intercepted = tracing.unsupported_reason(call.tensors)
    if intercepted is not None:
        return intercepted
    missing = kernels.unsupported_reason()
    if missing is not None:
        return f"the compiled kernel is not available: {missing}"
    if call.query.dtype == torch.float16 and not kernels.features() & kernels.HALVES:
        return "this processor has no float16 conversion"
    return None


def _extra(tensor: Tensor | None) -> tuple[int | None, int, tuple[int, ...]]:
    """Address, type and strides of a mask or bias; stride 0 for dimensions that broadcast."""
    if tensor is None:
        return None, 0, strides_of(None)
    return tensor.data_ptr(), _TYPES[tensor.dtype], strides_of(tensor)


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    is_causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    library = kernels.build().library
    assert library is not None
    if query.stride(-1) != 1:
        query = query.contiguous()
    B, H, T, D = query.shape
    _, G, S, Dv = value.shape
    out = query.new_empty((B, H, T, Dv))
    mask_at, mask_type, mask_stride = _extra(mask)
    bias_at, bias_type, bias_stride = _extra(bias)
    call = _Call(
        *(query.data_ptr(), key.data_ptr(), value.data_ptr(), mask_at, bias_at, out.data_ptr(), kernels.parallel()),
        *(B, H, G, T, S, D, Dv),
        *(_TYPES[query.dtype], mask_type, bias_type),
        *(query.stride()[:3], key.stride()[:3], value.stride()[:3], mask_stride, bias_stride),
        *(is_causal, window or 0, torch.get_num_threads()),
        *(scale, softcap or 0.0),
    )
    library.regroup_decode(ctypes.byref(call))
    return out


_op = torch.library.custom_op("regroup::cpu_decode", _decode, mutates_args=(), device_types="cpu")
_op.register_fake(result_of)


def run(call: Call) -> Tensor:
    """Attention by the compiled kernel, with sums in float32 (bfloat16 products where the processor has them).

    Only for supported calls.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    # PyTorch's dispatcher takes as long as a short context; only what records operators needs to see one.
    return (_op if tracing.is_recorded() else _decode)(*arguments(call))


register(
    Backend(
        name="cpu",
        preferences=(
            Preference(
                50,
                lambda call: decoding.decodes_without_grad(call, "cpu"),
                "decoding on a CPU: the compiled kernel reads each KV head once, on all threads",
            ),
            Preference(50, decoding.decodes_any_length, "decoding a context of any length by a kernel"),
        ),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could, but is not faster for this call",
    )
)
