"""Decoding on a GPU by a Triton kernel that splits the context into parts ("Flash-Decoding", Dao et al. 2023).

A program reads one part of one KV head once, for all query heads of its group. They are the rows of a tile of at least
16, so that even one query position gives matrix products. A second kernel merges the parts.

Its results are tested in Triton's interpreter, and it compiles for sm_80 and sm_90. It has not been run or timed on a
GPU; the sizes of tiles and parts are guesses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import decoding, tracing
from ..call import Call
from ..decoding import arguments, result_of, strides_of
from ..registry import Backend, Preference, register
from ..tracing import constant

MAX_WIDTH = 256
_FEWEST_KEYS = 128  # of a part
_MOST_PARTS = 128


@constant
def _triton_unsupported_reason() -> str | None:
    """The reason why Triton is not available, or None."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"Triton cannot be imported ({error}): pip install triton"
    return None


@constant
def _interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (``TRITON_INTERPRET=1`` before it is imported), on any tensor."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def unsupported_reason(call: Call) -> str | None:
    """The reason why the kernel cannot serve a call, or None."""
    other = decoding.unsupported_reason(call)
    if other is not None:
        return other
    if max(call.head_dim, call.value_dim) > MAX_WIDTH:
        return f"heads of {max(call.head_dim, call.value_dim)} are wider than {MAX_WIDTH}"
    device = call.query.device.type
    if device not in ("cuda", "xpu", "cpu"):
        return f"Triton does not run on {device}"
    intercepted = tracing.unsupported_reason(call.tensors)
    if intercepted is not None:
        return intercepted
    missing = _triton_unsupported_reason()
    if missing is not None:
        return missing
    if device == "cpu" and not _interpreted():
        return "the tensors are on the CPU, where Triton has only an interpreter (TRITON_INTERPRET=1, for tests)"
    return None


def _power(size: int) -> int:
    """The next power of two, at least 16: a dimension of a tile."""
    return max(16, 1 << (size - 1).bit_length())


def _programs(device: torch.device) -> int:
    """The number of programs that keep a device busy."""
    if device.type == "cuda":
        return 4 * torch.cuda.get_device_properties(device).multi_processor_count
    if device.type == "xpu":
        return 4 * torch.xpu.get_device_properties(device).max_compute_units
    return 8


@torch.library.custom_op("regroup::triton_decode", mutates_args=())
def _op(
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
    from .triton_kernels import attend as attend_kernel
    from .triton_kernels import merge as merge_kernel

    # A triton.jit function is called with a grid and with additional options.
    attend: Any = attend_kernel
    merge: Any = merge_kernel
    B, H, T, D = query.shape
    _, G, S, Dv = value.shape
    rows = H // G * T
    line = max(_power(D), _power(Dv)) * query.element_size()
    # A program's queries, keys and values must fit into shared memory, 100 KB on small GPUs.
    tile = min(64 if line <= 512 else 16, _power(rows))
    tiles = -(-rows // tile)
    keys = 64 if line <= 256 else 32 if line <= 512 else 16
    low = 0 if window is None else min(S, max(0, S - T - window + 1))
    wanted = max(1, min(_programs(query.device) // (B * G * tiles), (S - low) // _FEWEST_KEYS, _MOST_PARTS))
    length = (S - low + wanted * keys - 1) // (wanted * keys) * keys
    parts = max(1, (S - low + length - 1) // max(1, length))
    sums = torch.empty(B * G, parts, rows, Dv, dtype=torch.float32, device=query.device)
    states = torch.empty(B * G, parts, rows, 2, dtype=torch.float32, device=query.device)
    out = torch.empty(B, H, T, Dv, dtype=query.dtype, device=query.device)
    if mask is None:
        masked, mask_kind = query, 0  # any pointer: it is not read
    elif mask.dtype == torch.bool:
        masked, mask_kind = mask.view(torch.uint8), 1
    else:
        masked, mask_kind = mask, 2
    # Triton launches on the current device.
    with torch.cuda.device_of(query):
        attend[(B * G, parts, tiles)](
            *(query, key, value, masked, query if bias is None else bias, sums, states),
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *strides_of(mask),
            *strides_of(bias),
            *(G, H // G, T, S, D, Dv, low, length),
            *(scale, 1.0 if softcap is None else softcap, 0 if window is None else window),
            MASK=mask_kind,
            BIAS=bias is not None,
            CAUSAL=is_causal,
            WINDOW=window is not None,
            SOFTCAP=softcap is not None,
            ROWS=tile,
            KEYS=keys,
            WIDTH=_power(D),
            VALUE_WIDTH=_power(Dv),
            INTERPRETED=_interpreted(),
            num_warps=4,
            num_stages=2,
        )
        merge[(B * G, rows)](
            *(sums, states, out, parts, rows, Dv),
            PARTS=1 << (parts - 1).bit_length(),
            VALUE_WIDTH=_power(Dv),
            INTERPRETED=_interpreted(),
        )
    return out


_op.register_fake(result_of)


def run(call: Call) -> Tensor:
    """Attention by the Triton kernels, with sums in float32. Only for supported calls.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    return _op(*arguments(call))


register(
    Backend(
        name="triton",
        preferences=(
            Preference(
                40,
                lambda call: decoding.decodes_without_grad(call, "cuda"),
                "decoding on a GPU: the kernel splits the context over the processors",
            ),
            Preference(40, decoding.decodes_any_length, "decoding a context of any length by a kernel"),
        ),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could, but is for decoding (few queries)",
    )
)
