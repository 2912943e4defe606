"""``grouped_query_attention`` and the choice of its backend."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import RegroupError
from .autocast import autocast_dtype
from .call import Call, make_call
from .cpu.decode import has_short_vectors
from .packed import is_fused
from .sizes import is_exported, is_fixed

_FILES = {
    "reference": "reference",
    "sdpa": "sdpa",
    "packed": "packed",
    "dense": "dense",
    "flex": "flex",
    "triton": "triton_decode",
    "cpu": "cpu.decode",
}
# Each has ``reason(call)``, why it cannot serve, and ``run(call)``. None needs a compiler or Triton to be imported.
_MODULES: dict[str, ModuleType] = {name: import_module(f".{file}", __package__) for name, file in _FILES.items()}
BACKENDS = ("auto", *_MODULES)
# Queries beyond which attention is a matter of arithmetic, not of reading the KV heads: prefill.
_PREFILL = 64
# Query rows of a KV head from which decoding is a matter of arithmetic on processors with short vectors.
_MANY_ROWS = 32
# Bytes of keys and values below which the compiled CPU kernel gains nothing.
_CPU_BYTES = 1 << 16


@dataclass(frozen=True)
class Choice:
    """Which backend serves a call, and why no other does.

    Attributes:
        backend: the one that is taken.
        why: in a few words.
        others: every other backend by name, and why it is not taken.
    """

    backend: str
    why: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.others.items()])


def _preferred(call: Call) -> list[tuple[str, str]]:
    """Backends for a call, the best first, and why each would be taken; the last serves every call."""
    if call.is_empty:
        return [("reference", "there is nothing to compute")]
    if call.is_open or call.dropout or is_exported():
        return _preferred_for_any_size(call)
    device, length = call.query.device.type, call.query_length
    decodes = length <= _PREFILL
    found = []
    if decodes and device == "cpu" and not call.needs_grad and _held(call) >= _CPU_BYTES:
        if _multiplies(call):
            found.append(("packed", "so many query heads share a KV head that arithmetic binds, not reading"))
        found.append(("cpu", "decoding on a CPU: the compiled kernel reads each KV head once, on all threads"))
    if decodes and device == "cuda" and not call.needs_grad:
        found.append(("triton", "decoding on a GPU: the kernel splits the context over the processors"))
    if not decodes or (call.is_causal and length == call.context > 1):
        found.append(("sdpa", "prefill that one call of PyTorch's fused kernel serves"))
    if not decodes and device == "cuda":
        found.append(("flex", "prefill on a GPU with what PyTorch's SDPA does not take"))
    found.append(("packed", "it serves every call, and repeats nothing"))
    return found


def _preferred_for_any_size(call: Call) -> list[tuple[str, str]]:
    """The same for graphs that leave this process or serve any size: nothing is asked of the sizes."""
    found = []
    if not is_exported() and is_fixed(call.query_length) and not call.needs_grad:
        found = [(name, "decoding a context of any length by a kernel") for name in ("cpu", "triton")]
    if not torch.onnx.is_in_onnx_export():  # ONNX's form of SDPA has no grouped heads, or no zeros for hidden rows
        found.append(("dense", "it takes any length, and dropout"))
    return [*found, ("reference", "it serves every call, of any length")]


def _held(call: Call) -> int:
    """Bytes of keys and values."""
    heads = call.batch * call.num_key_value_heads
    return heads * call.context * (call.head_dim + call.value_dim) * call.key.element_size()


def _multiplies(call: Call) -> bool:
    """Whether PyTorch's fused kernel is faster than ours: it multiplies faster on AVX2, and shares out whole KV heads
    (measured: docs/benchmarks.md)."""
    heads = call.batch * call.num_key_value_heads
    if call.group * call.query_length < _MANY_ROWS or heads < 2 * torch.get_num_threads():
        return False
    return has_short_vectors() and is_fused(call)


def _choose(call: Call) -> str:
    for name, _ in _preferred(call):
        if _MODULES[name].reason(call) is None:
            return name
    raise AssertionError("the last backend serves every call")


def explain(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Choice:
    """Which backend :func:`grouped_query_attention` takes for these arguments, and why not the others.

    Args:
        query, key, value, arguments: as there, ``backend`` excepted. Nothing is computed.

    Raises:
        RegroupError: arguments that do not fit each other.
    """
    call = make_call(query, key, value, **arguments)
    backend = _choose(call)
    preferred = dict(reversed(_preferred(call)))  # of two reasons for one backend, the first
    others = {}
    for name, module in _MODULES.items():
        if name != backend:
            others[name] = module.reason(call) or _UNWANTED[name]
    return Choice(backend, preferred[backend], others)


# Why a backend that could serve a call was not taken.
_UNWANTED = {
    "reference": "it could, in float32 with all scores in memory: it is what the others are tested against",
    "sdpa": "it could; it reads a KV head once for each query head, which costs where queries are few",
    "packed": "it could, but is not the fastest here",
    "dense": "it could, with a mask as large as a head's scores: it is for graphs of any length, and dropout",
    "flex": "it could, but is for long queries on GPUs: it compiles for each form of call, and on CPUs is slower",
    "triton": "it could, but is for decoding: few queries",
    "cpu": "it could, but is not faster here",
}


def grouped_query_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Attention of H query heads to G shared KV heads: multi-head (G = H), grouped, multi-query (G = 1).

    Query head h reads KV head h // (H / G); scores are ``softcap(scale · q·k) + bias + mask``.

    Args:
        query: (B, H, T, D), float32, bfloat16, float16 or float64. Under ``torch.autocast`` all but float64 is cast to
            its dtype, as it is for ``scaled_dot_product_attention``; elsewhere dtypes that differ are refused.
        key: (B, G, S, D), same dtype and device; may be any view, such as the filled part of a cache.
        value: (B, G, S, Dv).
        mask: broadcasts to (B, H, T, S); bool (True: may attend) or floating (added). A query that may attend to
            nothing gives zeros.
        bias: broadcasts to (B, H, T, S); floating, added (T5's relative bias, ALiBi).
        is_causal: query i sees key j if j <= i + S − T: the last query is the newest token.
        scale: 1 / sqrt(D) by default.
        window: W; query i sees key j if j > i + S − T − W.
        softcap: c; scores become c · tanh(score / c) before bias and mask.
        dropout_p: probability that a weight becomes 0, in evaluation too; those that stay are divided by 1 − dropout_p.
        backend: one of :data:`BACKENDS`; see :func:`explain`.

    Returns:
        (B, H, T, Dv) in the query's dtype, as autocast leaves it.

    Raises:
        RegroupError: arguments that do not fit each other, or a named backend that cannot serve the call.
    """
    call = make_call(
        query,
        key,
        value,
        mask=mask,
        bias=bias,
        is_causal=is_causal,
        scale=scale,
        window=window,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    if backend not in BACKENDS:
        raise RegroupError("there is no such backend", expected=", ".join(BACKENDS), got=backend)
    if autocast_dtype(call.query.device) is None:
        return _attend(call, backend)
    # What is cast is cast: inside, a backend sums in the dtypes that it means.
    with torch.autocast(call.query.device.type, enabled=False):
        return _attend(call, backend)


def _attend(call: Call, backend: str) -> Tensor:
    if backend == "auto" or call.is_empty:
        return _MODULES[_choose(call)].run(call)
    module = _MODULES[backend]
    why_not = module.reason(call)
    if why_not is not None:
        raise RegroupError(
            f"the {backend} backend cannot serve this call: {why_not}",
            remedy='take backend="auto"; regroup.attention.explain(…) says what it chooses',
        )
    return module.run(call)
