"""One checked call of the operator, which is the input of every backend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RegroupError
from .autocast import autocast_dtype, lowered
from .checks import check_each, check_together, checked_number, is_finite, whole_number
from .sizes import is_certain, is_exported, is_fixed, is_traced, untraced

# A window as large as any context, within the integers of the kernels.
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
        num_heads, num_key_value_heads, head_dim, value_dim: H, G, D and Dv: constants of a model, also for
            ``torch.jit.trace``.
        is_open: whether a compiler or tracer treats some size as dynamic, so that no branch may depend on it.
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
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    value_dim: int
    is_open: bool

    @property
    def is_empty(self) -> bool:
        """Whether some tensor has no elements."""
        # A dynamic size is assumed not to be 0.
        return not self.is_open and (0 in self.query.shape or 0 in self.key.shape or 0 in self.value.shape)

    @property
    def any_size(self) -> bool:
        """Whether the call becomes part of a graph that serves other sizes, or leaves this process."""
        return self.is_open or is_exported()

    @property
    def batch(self) -> int:
        return self.query.shape[0]

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
    def needs_grad(self) -> bool:
        """Whether autograd needs gradients of this call."""
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in self.tensors)

    @property
    def learns_scores(self) -> bool:
        """Whether the mask or bias is trained (T5's relative bias)."""
        return torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (self.mask, self.bias)
        )

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors of the call."""
        named = (self.query, self.key, self.value, self.mask, self.bias)
        return tuple(tensor for tensor in named if tensor is not None)

    def span(self, start: int, stop: int) -> tuple[int, int]:
        """The range of keys, as first and end, that positions allow queries ``start`` to ``stop`` to see."""
        shift = self.context - self.query_length
        first = 0 if self.window is None else max(0, start + shift - self.window + 1)
        last = stop + shift if self.is_causal else self.context
        return min(first, self.context - 1), last

    def hides_by_window(self, start: int, stop: int) -> bool:
        """Whether some key of :meth:`span` precedes the window of some of these queries."""
        if self.window is None:
            return False
        first, _ = self.span(start, stop)
        return stop - 1 + self.context - self.query_length - self.window >= first

    def needs_positions(self, start: int, stop: int) -> bool:
        """Whether some key of :meth:`span` is hidden by position from some of these queries."""
        return self.hides_by_window(start, stop) or (self.is_causal and stop - start > 1)

    def positions(self, start: int, stop: int) -> Tensor | None:
        """(stop − start, keys of the span), bool: the keys that positions allow each query to see; None if all."""
        if not self.needs_positions(start, stop):
            return None
        first, last = self.span(start, stop)
        shift = self.context - self.query_length
        rows = torch.arange(start + shift, stop + shift, device=self.query.device)[:, None]
        columns = torch.arange(first, last, device=self.query.device)[None, :]
        visible = None
        if self.is_causal and stop - start > 1:
            visible = columns <= rows
        if self.window is not None and self.hides_by_window(start, stop):
            near = columns > rows - self.window
            visible = near if visible is None else visible & near
        return visible


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
    """Check that the arguments of a call are consistent.

    Args:
        query, key, value, mask, bias, is_causal, window, softcap: see :class:`Call`; mask and bias may have fewer
            than four dimensions, which broadcast as in NumPy. ``torch.autocast`` casts them as
            it casts the arguments of PyTorch's ``scaled_dot_product_attention``.
        scale: 1 / sqrt(D) by default.
        dropout_p: see :attr:`Call.dropout`.

    Raises:
        RegroupError: an argument is wrong; it is named with what was expected.
    """
    untraced(check_each, query, key, value)
    mixed = autocast_dtype(query.device) is not None
    if mixed:
        query, key, value = lowered(query), lowered(key), lowered(value)
    num_heads, num_key_value_heads, head_dim, value_dim = untraced(
        check_together, query, key, value, mask, bias, is_causal
    )
    if mixed and query.dtype != torch.float64:
        mask, bias = (None if extra is None else lowered(extra) for extra in (mask, bias))
    if window is not None:
        count = whole_number(window)
        if count is None or count < 1:
            raise RegroupError("the window is not a whole number of keys", expected="None, 1 or more", got=repr(window))
        window = min(count, _WIDEST)
    if softcap is not None:
        checked_number(softcap, "softcap")
        if not (softcap > 0 and is_finite(softcap)):
            raise RegroupError("the soft cap is not a positive number", expected="None or more than 0", got=softcap)
    if scale is None:
        factor = 1.0 if is_certain(head_dim == 0) else head_dim**-0.5
    else:
        factor = checked_number(scale, "scale", "multiply the query by the trained scale, and pass scale=1")
        if not is_finite(factor):
            raise RegroupError("the scale is not a finite number", got=scale)
    if type(dropout_p) is not float:
        dropout_p = float(checked_number(dropout_p, "dropout_p"))
    if not 0 <= dropout_p <= 1:
        raise RegroupError("the dropout is not a probability", expected="dropout_p from 0 to 1", got=dropout_p)
    single = not is_traced() and is_certain(query.shape[2] == 1)
    # The last query sees all keys, whether causal or not.
    is_causal = bool(is_causal) and not single
    arrays = (query, key, value, _in_four(mask), _in_four(bias))
    sizes = (num_heads, num_key_value_heads, head_dim, value_dim)
    is_open = not is_fixed(*query.shape, *key.shape, *value.shape)
    return Call(*arrays, is_causal, factor, window, softcap, dropout_p, *sizes, is_open)


def _in_four(tensor: Tensor | None) -> Tensor | None:
    """A mask or bias as a view of four dimensions."""
    return tensor if tensor is None or tensor.dim() == 4 else tensor[(None,) * (4 - tensor.dim())]
