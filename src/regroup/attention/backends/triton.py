"""Decoding on a GPU by a Triton kernel that cuts the context into parts ("Flash-Decoding", Dao et al. 2023).

A program reads one part of one KV head once, for all query heads of its group: they are the rows of a tile of 16 and
more, so that even one query position makes matrix products. A second kernel merges the parts.

It has run in Triton's interpreter only, where its results are tested, and compiles for sm_80 and sm_90; it was never
run nor timed on a GPU, and the sizes of tiles and parts are guesses.
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
def _import_failure() -> str | None:
    """Why there is no Triton."""
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
    """Why this backend cannot serve a call; None if it can."""
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
    missing = _import_failure()
    if missing is not None:
        return missing
    if device == "cpu" and not _interpreted():
        return "the tensors are on the CPU, where only Triton's interpreter runs (TRITON_INTERPRET=1, for tests)"
    return None


def _power(size: int) -> int:
    """The power of two, 16 and more, that holds so many: the shapes of tiles."""
    return max(16, 1 << (size - 1).bit_length())


def _programs(device: torch.device) -> int:
    """How many programs keep a device busy."""
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

    # What triton.jit makes is called with a grid, and with options of its own.
    attend: Any = attend_kernel
    merge: Any = merge_kernel
    B, H, T, D = query.shape
    _, G, S, Dv = value.shape
    rows = H // G * T
    line = max(_power(D), _power(Dv)) * query.element_size()
    # What a program holds of queries, keys and values must fit a processor's shared memory, 100 KB on small GPUs.
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
    """Attention by the Triton kernels, with sums in float32. Only for calls that they can serve.

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
        not_preferred="it could, but is for decoding: few queries",
    )
)
