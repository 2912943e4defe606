"""``grouped_query_attention`` and the choice of its backend."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..errors import RegroupError
from .call import Call, make_call

_MODULES = {
    "reference": "reference",
    "sdpa": "sdpa",
    "packed": "packed",
    "flex": "flex",
    "triton": "triton_decode",
    "cpu": "cpu_decode",
}
BACKENDS = ("auto", *_MODULES)


@dataclass(frozen=True)
class Choice:
    """Which backend serves a call, and why no other does.

    Attributes:
        backend: the one that is taken.
        why: in a few words.
        others: every other backend, and why it is not taken.
    """

    backend: str
    why: str
    others: dict[str, str]


def _module(name: str) -> Any:
    return importlib.import_module(f".{_MODULES[name]}", __package__)


def _choose(call: Call) -> str:
    return "packed"


def explain(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Choice:
    """Which backend :func:`grouped_query_attention` takes for these arguments, and why not the others."""
    backend = _choose(make_call(query, key, value, **arguments))
    return Choice(backend, "", {})


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
    backend: str = "auto",
) -> Tensor:
    """Attention of H query heads to G shared KV heads: multi-head (G = H), grouped, multi-query (G = 1).

    Query head h reads KV head h // (H / G); scores are ``softcap(scale · q·k) + bias + mask``.

    Args:
        query: (B, H, T, D), float32, bfloat16, float16 or float64.
        key: (B, G, S, D), same dtype and device; may be any view, such as the filled part of a cache.
        value: (B, G, S, Dv).
        mask: broadcasts to (B, H, T, S); bool (True: may attend) or floating (added). A query that may attend to
            nothing gives zeros.
        bias: broadcasts to (B, H, T, S); floating, added (T5's relative bias, ALiBi).
        is_causal: query i sees key j if j <= i + S − T: the last query is the newest token.
        scale: 1 / sqrt(D) by default.
        window: W; query i sees key j if j > i + S − T − W.
        softcap: c; scores become c · tanh(score / c) before bias and mask.
        backend: one of :data:`BACKENDS`; see :func:`explain`.

    Returns:
        (B, H, T, Dv) in the query's dtype.

    Raises:
        RegroupError: arguments that do not fit each other, or a named backend that cannot serve the call.
    """
    call = make_call(
        query, key, value, mask=mask, bias=bias, is_causal=is_causal, scale=scale, window=window, softcap=softcap
    )
    if backend not in BACKENDS:
        raise RegroupError("There is no such backend.", expected=", ".join(BACKENDS), got=backend)
    name = _choose(call) if backend == "auto" else backend
    return _module(name).run(call)
