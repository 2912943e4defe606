"""One call of the operator, checked: what every backend is given."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import RegroupError
from .autocast import autocast_dtype, lowered
from .sizes import constant_size, is_certain, is_fixed, is_traced, untraced

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
        dropout: probability that a weight becomes 0; those that stay are divided by 1 − dropout.
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
    dropout: float

    @property
    def is_empty(self) -> bool:
        """Whether there are no queries, no keys, or no numbers in them."""
        sizes = (*self.query.shape, *self.key.shape, *self.value.shape)
        return not is_traced() and any([is_certain(size == 0) for size in sizes])

    @property
    def is_open(self) -> bool:
        """Whether a compiler or a tracer keeps some size open, so that no branch may depend on it."""
        return not is_fixed(*self.query.shape, *self.key.shape, *self.value.shape)

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def num_heads(self) -> int:
        return constant_size(self.query, 1)

    @property
    def num_key_value_heads(self) -> int:
        return constant_size(self.key, 1)

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.num_heads // self.num_key_value_heads

    @property
    def query_length(self) -> int:
        return self.query.shape[2]

    @property
    def context(self) -> int:
        return self.key.shape[2]

    @property
    def head_dim(self) -> int:
        return constant_size(self.query, 3)

    @property
    def value_dim(self) -> int:
        return constant_size(self.value, 3)

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


_FORMS = {
    "query": "(batch, heads, queries, head_dim)",
    "key": "(batch, KV heads, keys, head_dim)",
    "value": "(batch, KV heads, keys, width)",
}


def _check_each(tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        form = _FORMS[name]
        _check_dense(tensor, name, form)
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


def _check_dense(tensor: Any, name: str, form: str | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise RegroupError(f"the {name} is no tensor", tensor=name, expected=form, got=type(tensor).__name__)
    if tensor.is_nested or tensor.layout != torch.strided:
        raise RegroupError(
            f"the {name} is not a dense tensor",
            tensor=name,
            got="a nested tensor" if tensor.is_nested else tensor.layout,
            remedy="give a padded tensor and a mask" if tensor.is_nested else f"convert the {name}",
        )


def _check_together(query: Tensor, key: Tensor, value: Tensor) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise RegroupError(
                f"query and {name} differ in dtype",
                tensor=name,
                expected=query.dtype,
                got=tensor.dtype,
                remedy="convert one of them, or compute under torch.autocast, which does (float64 excepted)",
            )
        if tensor.device != query.device:
            raise RegroupError(
                f"query and {name} are on different devices",
                tensor=name,
                expected=query.device,
                got=tensor.device,
                remedy=f"move the {name}",
            )
        if is_certain(tensor.shape[0] != query.shape[0]):
            raise RegroupError(
                f"query and {name} differ in batch",
                tensor=name,
                expected=query.shape[0],
                got=tensor.shape[0],
                remedy="expand to one batch before (an expanded tensor takes no memory)",
            )
    for name, tensor in (("query", query), ("key", key)):
        if is_certain(tensor.shape[1] == 0):
            raise RegroupError(f"the {name} has no heads", tensor=name, expected=_FORMS[name], got=_shape(tensor))
    if is_certain(key.shape[3] != query.shape[3]):
        raise RegroupError(
            "query and key differ in head_dim",
            tensor="key",
            expected=f"{query.shape[3]}, as of the query {_shape(query)}",
            got=f"{key.shape[3]} of {_shape(key)}",
        )
    for which, axis in (("KV heads", 1), ("keys", 2)):
        if is_certain(key.shape[axis] != value.shape[axis]):
            raise RegroupError(
                f"key and value differ in the number of {which}",
                tensor="value",
                expected=f"{key.shape[axis]}, as of the key {_shape(key)}",
                got=f"{value.shape[axis]} of {_shape(value)}",
            )
    if is_certain(query.shape[1] % key.shape[1] != 0):
        raise RegroupError(
            "the query heads do not divide into groups of one size",
            tensor="key",
            expected=f"a number of KV heads that divides {query.shape[1]}",
            got=key.shape[1],
            remedy="check that heads are the second dimension, (batch, heads, tokens, width)",
        )


def _check_extra(tensor: Tensor | None, name: str, query: Tensor, key: Tensor) -> None:
    """Check what is added to scores or masks them."""
    if tensor is None:
        return
    _check_dense(tensor, name)
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
    fits = len(sizes) == 4 and not any(
        [is_certain(size != 1) and is_certain(size != wanted) for size, wanted in zip(sizes, full, strict=True)]
    )
    if not fits:
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


def _check(
    tensors: dict[str, Tensor], mask: Tensor | None, bias: Tensor | None, is_causal: Any, *, mixed: bool
) -> None:
    """Check tensors against each other. ``mixed``: autocast makes one dtype of them."""
    _check_each(tensors)
    query, key, value = tensors.values()
    if mixed:
        query, key, value = lowered(query), lowered(key), lowered(value)
    _check_together(query, key, value)
    _check_extra(mask, "mask", query, key)
    _check_extra(bias, "bias", query, key)
    if not isinstance(is_causal, (bool, torch.SymBool)):
        raise RegroupError("is_causal is neither True nor False", expected="a bool", got=type(is_causal).__name__)
    if is_causal and is_certain(query.shape[2] > key.shape[2]) and is_certain(key.shape[2] > 0):
        raise RegroupError(
            "causal attention has more queries than keys: the first queries would see nothing",
            tensor="query",
            expected=f"at most {key.shape[2]} queries",
            got=query.shape[2],
            remedy="give the keys of all tokens, those of the queries among them",
        )


def whole_number(number: Any) -> int | None:
    """A number that is whole by its type: Python's, NumPy's, a tensor without dimensions; None for all others."""
    if isinstance(number, (int, torch.SymInt)):
        return None if isinstance(number, bool) else number
    if isinstance(number, Tensor) and (number.dim() > 0 or number.dtype == torch.bool or number.is_meta):
        return None
    try:
        return operator.index(number)
    except (TypeError, RuntimeError):
        return None


def _number(number: Any, name: str, remedy: str | None = None) -> Any:
    if not isinstance(number, (Real, torch.SymInt, torch.SymFloat)):
        raise RegroupError(
            f"the {name} is no number", expected="None or a number", got=type(number).__name__, remedy=remedy
        )
    return number


def _finite(number: Any) -> bool:
    return not is_fixed(number) or math.isfinite(number)


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
    dropout_p: float = 0.0,
) -> Call:
    """Check the arguments of a call against each other.

    Args:
        query, key, value, mask, bias, is_causal, window, softcap: see :class:`Call`; mask and bias may have fewer
            than four dimensions, which broadcast as in NumPy. Under ``torch.autocast`` all of them are cast, as it
            casts the arguments of PyTorch's ``scaled_dot_product_attention``.
        scale: 1 / sqrt(D) by default.
        dropout_p: see :attr:`Call.dropout`.

    Raises:
        RegroupError: whatever does not fit, named with what was expected. Nothing is computed from it.
    """
    tensors = {"query": query, "key": key, "value": value}
    mixed = isinstance(query, Tensor) and autocast_dtype(query.device) is not None
    if is_traced():
        with untraced():
            _check(tensors, mask, bias, is_causal, mixed=mixed)
    else:
        _check(tensors, mask, bias, is_causal, mixed=mixed)
    if mixed:
        query, key, value = lowered(query), lowered(key), lowered(value)
        if query.dtype != torch.float64:
            mask, bias = (None if extra is None else lowered(extra) for extra in (mask, bias))
    if window is not None:
        count = whole_number(window)
        if count is None or count < 1:
            raise RegroupError("the window is no whole number of keys", expected="None, 1 or more", got=repr(window))
        window = min(count, _WIDEST)
    if softcap is not None:
        _number(softcap, "softcap")
        if not (softcap > 0 and _finite(softcap)):
            raise RegroupError("the soft cap is no positive number", expected="None or more than 0", got=softcap)
    if scale is None:
        width = constant_size(query, 3)
        scale = 1.0 if is_certain(width == 0) else width**-0.5
    else:
        _number(scale, "scale", "multiply the query by a trained scale, and give scale=1")
        if not _finite(scale):
            raise RegroupError("the scale is no finite number", got=scale)
    if not 0 <= _number(dropout_p, "dropout_p") <= 1:
        raise RegroupError("the dropout is no probability", expected="dropout_p from 0 to 1", got=dropout_p)
    one = not is_traced() and is_certain(query.shape[2] == 1)
    # The last query sees all keys, with causality or without.
    is_causal = bool(is_causal) and not one
    return Call(
        query, key, value, _in_four(mask), _in_four(bias), is_causal, scale, window, softcap, float(dropout_p)
    )


def _in_four(tensor: Tensor | None) -> Tensor | None:
    """A mask or bias as a view of four dimensions."""
    return tensor if tensor is None or tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]
