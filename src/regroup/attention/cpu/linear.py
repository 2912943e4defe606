"""Linear layers of few rows on a CPU by a compiled kernel, which reads every weight once, in the checkpoint's layout.

The kernel is ``linear.cpp``, which ``build.py`` builds together with the attention kernel.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from .. import tracing
from .build import build, parallel

# Rows beyond which PyTorch's matrix product is as fast (benchmarks/linear.py).
MAX_ROWS = 64
_TYPES = {torch.float32: 0, torch.bfloat16: 1}


def serves(states: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether :func:`linear` supports a product; PyTorch's supports all."""
    tensors = (states, weight) if bias is None else (states, weight, bias)
    if states.dtype not in _TYPES or tracing.unsupported_reason(tensors) is not None:
        return False
    if any(tensor.dtype != states.dtype or tensor.device.type != "cpu" for tensor in tensors):
        return False
    # The kernel does not check sizes. If they do not match, PyTorch raises an error or broadcasts.
    if states.shape[-1:] != weight.shape[1:] or (bias is not None and bias.shape != weight.shape[:1]):
        return False
    if weight.stride() != (weight.shape[1], 1) or (bias is not None and bias.stride() != (1,)):
        return False
    if not 0 < states.numel() <= MAX_ROWS * states.shape[-1] or torch.is_autocast_enabled("cpu"):
        return False
    return not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))


@functools.cache
def _kernel() -> Any:
    library = build().library
    assert library is not None
    found = library.regroup_linear
    found.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 6 + [ctypes.c_void_p]
    found.restype = None
    return found


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    outs, columns = weight.shape
    rows = states.reshape(-1, columns)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = states.new_empty((*states.shape[:-1], outs))
    _kernel()(
        rows.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        out.data_ptr(),
        *(rows.shape[0], outs, columns, rows.stride(0), _TYPES[states.dtype], torch.get_num_threads()),
        parallel(),
    )
    return out


@torch.library.custom_op("regroup::cpu_linear", mutates_args=(), device_types="cpu")
def _op(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _linear(states, weight, bias)


@_op.register_fake
def _(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return states.new_empty((*states.shape[:-1], weight.shape[0]))


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of few rows, summed in float32 and rounded once. Only if :func:`serves` returns True.

    A row has the same bits in any batch, and with any number of threads.

    Args:
        states: (…, in), float32 or bfloat16, with at most :data:`MAX_ROWS` rows in total.
        weight: (out, in), contiguous.
        bias: (out,) or None.

    Returns:
        (…, out) in the dtype of the states.
    """
    return (_op if tracing.is_recorded() else _linear)(states, weight, bias)
