"""``grouped_query_attention`` and the choice of its backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import RegroupError
from . import backends  # noqa: F401  # registers them
from .autocast import autocast_dtype
from .call import Call, make_call
from .registry import BY_NAME, IN_ORDER, Backend

# Those of this package.
BACKENDS = ("auto", *BY_NAME)


@dataclass(frozen=True)
class Choice:
    """The backend that serves a call, and why the others do not.

    Attributes:
        backend: its name.
        why: why it was chosen.
        others: every other backend by name, and why it was not chosen.
    """

    backend: str
    why: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{self.backend}: {self.why}"]
        return "\n".join(lines + [f"  not {name}: {why}" for name, why in self.others.items()])


def _choose(call: Call) -> tuple[Backend, str]:
    """The backend that serves a call, and why it was chosen."""
    for preference, backend in IN_ORDER:
        if preference.applies(call) and backend.unsupported_reason(call) is None:
            return backend, preference.why
    raise AssertionError("the reference serves every call")


def explain(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Choice:
    """Which backend :func:`grouped_query_attention` chooses for these arguments, and why not the others.

    Args:
        query, key, value, arguments: as there, except ``backend``. Nothing is computed.

    Raises:
        RegroupError: the arguments are inconsistent.
    """
    call = make_call(query, key, value, **arguments)
    chosen, why = _choose(call)
    others = {
        name: backend.unsupported_reason(call) or backend.not_preferred
        for name, backend in BY_NAME.items()
        if backend is not chosen
    }
    return Choice(chosen.name, why, others)


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
        query: (B, H, T, D), float32, bfloat16, float16 or float64. ``torch.autocast`` casts all but float64 to its
            dtype, as it does for ``scaled_dot_product_attention``; otherwise different dtypes are an error.
        key: (B, G, S, D), same dtype and device; any view, such as the filled part of a cache.
        value: (B, G, S, Dv).
        mask: broadcasts to (B, H, T, S); bool (True: may attend) or floating (added). A query that may not attend
            to any key gives zeros.
        bias: broadcasts to (B, H, T, S); floating, added (T5's relative bias, ALiBi).
        is_causal: query i sees key j if j <= i + S − T: the last query is the newest token.
        scale: 1 / sqrt(D) by default.
        window: W; query i sees key j if j > i + S − T − W.
        softcap: c; scores become c · tanh(score / c) before bias and mask.
        dropout_p: probability that a weight becomes 0, also in evaluation; the others are divided by 1 − dropout_p.
        backend: one of :data:`BACKENDS`; see :func:`explain`.

    Returns:
        (B, H, T, Dv) in the dtype of the query, after autocast.

    Raises:
        RegroupError: the arguments are inconsistent, or a named backend that cannot serve the call.
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
    if backend != "auto" and backend not in BY_NAME:
        raise RegroupError("unknown attention backend", expected=", ".join(("auto", *BY_NAME)), got=backend)
    if autocast_dtype(call.query.device) is None:
        return _attend(call, backend)
    # The arguments are cast already; a backend chooses the dtypes of its sums itself.
    with torch.autocast(call.query.device.type, enabled=False):
        return _attend(call, backend)


def _attend(call: Call, backend: str) -> Tensor:
    if backend == "auto" or call.is_empty:
        chosen, _ = _choose(call)
        return chosen.run(call)
    reason = BY_NAME[backend].unsupported_reason(call)
    if reason is not None:
        raise RegroupError(
            f"the {backend} backend cannot serve this call: {reason}",
            remedy='use backend="auto"; regroup.attention.explain(…) shows its choice',
        )
    return BY_NAME[backend].run(call)
