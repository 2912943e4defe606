"""One call of the operator, checked: what every backend is given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real

import torch
from torch import Tensor

from ..errors import RegroupError

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# A window as wide as any context, and as kernels count.
_WIDEST = 1 << 62


@dataclass(frozen=True)
class Call:
    """Arguments of one call, consistent with each other. Made by :func:`make_call`.

    Query head h reads KV head h // (H / G). Scores are ``softcap(scale · q·k) + bias + mask``; a query that may attend
    to no key gives zeros.

    Attributes:
        query: (B, H, T, D).
        key: (B, G, S, D), H divisible by G.
        value: (B, G, S, Dv).
        mask: None, or four dimensions that broadcast to (B, H, T, S): bool (True: may attend), or floating and added.
        bias: None, or floating, four dimensions that broadcast to (B, H, T, S); added.
        is_causal: query i sees key j if j <= i + S − T (the last query sees all keys).
        scale: factor of the products.
        window: None, or W >= 1: query i sees key j if j > i + S − T − W; with ``is_causal`` that is W keys, its own
            among them (Mistral, Beltagy et al. 2020).
        softcap: None, or c: scores become c · tanh(score / c) before bias and mask (Gemma 2).
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    bias: Tensor | None
    is_causal: bool
    scale: float
    window: int | None
    softcap: float | None

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    @property
    def num_key_value_heads(self) -> int:
        return self.key.shape[1]

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    @property
    def query_length(self) -> int:
        return self.query.shape[2]

    @property
    def context(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return self.query.shape[3]

    @property
    def value_dim(self) -> int:
        return self.value.shape[3]

    @property
    def needs_grad(self) -> bool:
        """Whether autograd will ask for this call's gradients."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)

    @property
    def learns_scores(self) -> bool:
        """Whether what is added to the scores is trained (T5's relative bias)."""
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (self.mask, self.bias)
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are."""
        named = (self.query, self.key, self.value, self.mask, self.bias)
        return tuple(tensor for tensor in named if tensor is not None)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The keys, first and one past the last, that queries ``start`` to ``stop`` may see by position alone."""
        shift = self.context - self.query_length
        first = 0 if self.window is None else max(0, start + shift - self.window + 1)
        last = stop + shift if self.is_causal else self.context
        return min(first, self.context - 1), last

    def hides_by_window(self, start: int, stop: int) -> bool:
        """Whether some key of :meth:`span` is before the window of some of these queries."""
        if self.window is None:
            return False
        first, _ = self.span(start, stop)
        return stop - 1 + self.context - self.query_length - self.window >= first

    def needs_positions(self, start: int, stop: int) -> bool:
        """Whether some key of :meth:`span` is hidden by position from some of these queries."""
        return self.hides_by_window(start, stop) or (self.is_causal and stop - start > 1)

    def positions(self, start: int, stop: int) -> Tensor | None:
        """(stop − start, keys of the span), bool: which of them each query may see by position; None if all."""
        if not self.needs_positions(start, stop):
            return None
        first, last = self.span(start, stop)
        shift = self.context - self.query_length
        rows = torch.arange(start + shift, stop + shift, device=self.query.device)[:, None]
        columns = torch.arange(first, last, device=self.query.device)[None, :]
        seen = None
        if self.is_causal and stop - start > 1:
            seen = columns <= rows
        if self.window is not None and self.hides_by_window(start, stop):
            near = columns > rows - self.window
            seen = near if seen is None else seen & near
        return seen


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"


def _check_tensors(query: Tensor, key: Tensor, value: Tensor) -> None:
    named = {"query": (query, "(batch, heads, queries, head_dim)")}
    named |= {name: (tensor, "(batch, KV heads, keys, width)") for name, tensor in (("key", key), ("value", value))}
    for name, (tensor, form) in named.items():
        if not isinstance(tensor, Tensor):
            raise RegroupError(f"the {name} is no tensor", tensor=name, expected=form, got=type(tensor).__name__)
        if tensor.is_nested or tensor.layout != torch.strided:
            raise RegroupError(
                f"the {name} is not a dense tensor",
                tensor=name,
                got="a nested tensor" if tensor.is_nested else tensor.layout,
                remedy="give a padded tensor and a mask" if tensor.is_nested else f"convert the {name}",
            )
        if tensor.dim() != 4:
            raise RegroupError(f"the {name} has no four dimensions", tensor=name, expected=form, got=_shape(tensor))
        if tensor.dtype not in DTYPES:
            raise RegroupError(
                f"attention does not take a {name} of this dtype",
                tensor=name,
                expected="float32, bfloat16, float16 or float64",
                got=tensor.dtype,
                remedy=f"convert the {name}",
            )
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise RegroupError(
                f"query and {name} differ in dtype",
                tensor=name,
                expected=query.dtype,
                got=tensor.dtype,
                remedy="convert one of them",
            )
        if tensor.device != query.device:
            raise RegroupError(
                f"query and {name} are on different devices",
                tensor=name,
                expected=query.device,
                got=tensor.device,
                remedy=f"move the {name}",
            )
        if tensor.shape[0] != query.shape[0]:
            raise RegroupError(
                f"query and {name} differ in batch",
                tensor=name,
                expected=query.shape[0],
                got=tensor.shape[0],
                remedy="expand to one batch before (an expanded tensor takes no memory)",
            )
    if key.shape[2] == 0:
        raise RegroupError(
            "there are no keys to attend to", tensor="key", got=_shape(key), remedy="give one key or more"
        )
    for name, (tensor, form) in named.items():
        if 0 in tensor.shape:
            raise RegroupError(f"the {name} is empty", tensor=name, expected=form, got=_shape(tensor))
    if key.shape[3] != query.shape[3]:
        raise RegroupError(
            "query and key differ in head_dim",
            tensor="key",
            expected=f"{query.shape[3]}, as of the query {_shape(query)}",
            got=f"{key.shape[3]} of {_shape(key)}",
        )
    for which, axis in (("KV heads", 1), ("keys", 2)):
        if key.shape[axis] != value.shape[axis]:
            raise RegroupError(
                f"key and value differ in the number of {which}",
                tensor="value",
                expected=f"{key.shape[axis]}, as of the key {_shape(key)}",
                got=f"{value.shape[axis]} of {_shape(value)}",
            )
    if query.shape[1] % key.shape[1]:
        raise RegroupError(
            "the query heads do not divide into groups of one size",
            tensor="key",
            expected=f"a number of KV heads that divides {query.shape[1]}",
            got=key.shape[1],
            remedy="check that heads are the second dimension, (batch, heads, tokens, width)",
        )


def _broadcast(tensor: Tensor | None, name: str, query: Tensor, key: Tensor) -> Tensor | None:
    """What is added to scores or masks them, as a view of four dimensions."""
    if tensor is None:
        return None
    if not isinstance(tensor, Tensor):
        raise RegroupError(f"the {name} is no tensor", tensor=name, got=type(tensor).__name__)
    may_be_bool = name == "mask"
    if not (tensor.is_floating_point() or (may_be_bool and tensor.dtype == torch.bool)):
        raise RegroupError(
            f"a {name} cannot be of this dtype",
            tensor=name,
            expected="bool (True: may attend) or floating (added to scores)" if may_be_bool else "floating",
            got=tensor.dtype,
            remedy="convert a mask of ones and zeros with mask.bool()" if may_be_bool else None,
        )
    if tensor.device != query.device:
        raise RegroupError(
            f"query and {name} are on different devices", tensor=name, expected=query.device, got=tensor.device
        )
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    if len(sizes) != 4 or any(size not in (1, wanted) for size, wanted in zip(sizes, full, strict=True)):
        remedy = None
        if tuple(tensor.shape) == (full[0], full[3]):
            remedy = f"give padding of (batch, keys) as {name}[:, None, None, :]"
        elif tensor.dim() == 3 and tensor.shape[0] == full[0]:
            remedy = f"give what is the same for all heads as {name}[:, None]"
        raise RegroupError(
            f"the {name} does not fit the scores",
            tensor=name,
            expected=f"what broadcasts to (batch, heads, queries, keys) = {full}",
            got=_shape(tensor),
            remedy=remedy,
        )
    return tensor.view(sizes) if tensor.dim() != 4 else tensor


def make_call(
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
) -> Call:
    """Check the arguments of a call against each other.

    Args:
        query, key, value, mask, bias, is_causal, window, softcap: see :class:`Call`; mask and bias may have fewer
            than four dimensions, which broadcast as in NumPy.
        scale: 1 / sqrt(D) by default.

    Raises:
        RegroupError: whatever does not fit, named with what was expected. Nothing is computed from it.
    """
    _check_tensors(query, key, value)
    mask = _broadcast(mask, "mask", query, key)
    bias = _broadcast(bias, "bias", query, key)
    if is_causal and query.shape[2] > key.shape[2]:
        raise RegroupError(
            "causal attention has more queries than keys: the first queries would see nothing",
            tensor="query",
            expected=f"at most {key.shape[2]} queries",
            got=query.shape[2],
            remedy="give the keys of all tokens, those of the queries among them",
        )
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise RegroupError("the window is no whole number of keys", expected="None, 1 or more", got=repr(window))
    for name, number in (("scale", scale), ("softcap", softcap)):
        if number is not None and not isinstance(number, Real):
            raise RegroupError(
                f"the {name} is no number",
                expected="None or a number",
                got=type(number).__name__,
                remedy="multiply the query by a trained scale, and give scale=1" if name == "scale" else None,
            )
    if softcap is not None and not (softcap > 0 and math.isfinite(softcap)):
        raise RegroupError("the soft cap is no positive number", expected="None or more than 0", got=softcap)
    factor = query.shape[3] ** -0.5 if scale is None else scale
    if not math.isfinite(factor):
        raise RegroupError("the scale is no finite number", got=scale)
    if window is not None:
        window = min(window, _WIDEST)
    return Call(query, key, value, mask, bias, bool(is_causal), factor, window, softcap)
