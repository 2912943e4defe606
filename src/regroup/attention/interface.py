"""``attn_implementation="regroup"`` for the models of transformers that go through its attention interface.

Importing this module registers the name, as do :func:`regroup.register` and ``regroup.load``.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.models.mt5.modeling_mt5 import MT5Attention
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.utils import logging, output_capturing
from transformers.utils.import_utils import is_tracing

from ..errors import RegroupError
from .cache_layers import SlotOffset
from .grouped import grouped_query_attention
from .sizes import is_certain, is_exported, is_traced

NAME = "regroup"

logger: Any = logging.get_logger(__name__)

# Arguments that some families pass to their attention function, and that are not supported here.
_REFUSED = {
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "head_mask": "a mask of heads",
    "cache": "a paged cache",
}


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function, as transformers calls it.

    Args:
        module: the attention module; its ``is_causal`` is used if the argument is None.
        query, key, value: (B, H, T, D), (B, G, S, D), (B, G, S, Dv).
        attention_mask: the result of :func:`attention_mask`, or any mask that broadcasts to (B, H, T, S), bool or
            added. ``is_causal`` and ``sliding_window`` are used only without a mask.
        position_bias: added to the scores, broadcasts to (B, H, T, S). A bias that is
            the same for all keys by its strides is omitted: it does not change the softmax.
        dropout: of attention weights, in training.

    Returns:
        (B, T, H, Dv), contiguous, and None instead of weights.

    Raises:
        RegroupError: the family passes something that is not supported (attention sinks).
    """
    for name, what in _REFUSED.items():
        if kwargs.get(name) is not None:
            raise _refusal(module, what, f"{name}=…")
    if not torch.compiler.is_compiling():
        _warn_of_weights(kwargs)
    if position_bias is not None and (position_bias.stride(-1) == 0 or _is_zero(module)):
        position_bias = None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = grouped_query_attention(
        query,
        key,
        value,
        mask=attention_mask,
        bias=position_bias,
        is_causal=attention_mask is None and bool(causal),
        scale=scaling,
        window=sliding_window if attention_mask is None else None,
        softcap=softcap,
        dropout_p=dropout,
    )
    return output.transpose(1, 2).contiguous(), None


def _warn_of_weights(kwargs: dict[str, Any]) -> None:
    """Warn once, as transformers' ``sdpa`` does, that attention weights were requested but are not available.

    Some families (GPT-2, OPT) do not pass the argument on; the outputs that transformers collects show it for all.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    collected = (None if collector is None else collector.get()) or ()
    if kwargs.get("output_attentions") or any("attentions" in name for name in collected):
        logger.warning_once(
            f'attn_implementation="{NAME}" does not return attention weights with `output_attentions=True`. '
            'Use attn_implementation="eager" for them.'
        )


def _refusal(module: nn.Module, what: str, got: str) -> RegroupError:
    return RegroupError(
        f'attn_implementation="{NAME}" does not support {what}',
        layer=type(module).__name__,
        got=got,
        remedy='use attn_implementation="eager"',
    )


def _is_zero(module: nn.Module) -> bool:
    """Whether a module's bias is all zeros: UMT5 makes one for each cross-attention."""
    return type(module).__name__ == "UMT5Attention" and not module.has_relative_attention_bias


def attention_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    config: Any = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask function of transformers: bool (B, 1, T, S), True: may attend; None if no mask is needed.

    None if ``is_causal``, aligned to the last query, is sufficient: no padding, and no key hidden by a window or chunk.
    It takes the arguments of transformers' ``sdpa_mask``, and handles the order of slots of a full window
    (:class:`~regroup.attention.cache.SlidingKVLayer`).

    Raises:
        RegroupError: the model's class does not use the attention interface, and would ignore or misread the mask.
    """
    if config is not None and not torch.compiler.is_compiling():
        check_family(type(config))
    slots = kv_offset if isinstance(kv_offset, SlotOffset) else None
    if allow_is_causal_skip and _is_plain(q_length, kv_length, q_offset, kv_offset, attention_mask):
        if local_size is None or (not is_exported() and kv_length < local_size):
            return None
        if q_length == 1 and not torch.compiler.is_compiling():
            # A window or chunk hides keys from the first on: one query sees all of them if it sees the first.
            first = torch.zeros((), dtype=torch.long)
            if bool(mask_function(first, first, first + q_offset, first + kv_offset)):
                if slots is not None:
                    slots.order.position = q_offset
                return None
    mask = sdpa_mask(
        batch_size,
        q_length,
        kv_length,
        q_offset,
        kv_offset,
        mask_function,
        attention_mask,
        local_size,
        allow_is_causal_skip=False,  # its is_causal aligns the first query with the first key
        **kwargs,
    )
    if mask is not None and slots is not None:
        slots.order.position = q_offset
        mask = mask.roll(slots % slots.window, -1)
    return mask


def _is_plain(q_length: int, kv_length: int, q_offset: Any, kv_offset: int, padding: Tensor | None) -> bool:
    """Whether the last query is at the last key, and no key is padding, whenever a graph runs."""
    if isinstance(q_offset, Tensor) or is_traced() or not is_certain(q_offset + q_length == kv_offset + kv_length):
        return False
    if padding is None:
        return True
    if is_tracing(padding) or padding.shape[-1] < kv_offset + kv_length:
        return False
    return bool(padding[:, kv_offset : kv_offset + kv_length].all())


@cache
def check_family(config: type) -> None:
    """Refuse families that would use the mask but not the attention function, by their configuration class.

    Raises:
        RegroupError: the family's file does not use transformers' attention interface (BLOOM, Falcon).
    """
    name = config.__module__.replace(".configuration_", ".modeling_")
    modeling = sys.modules.get(name)
    if modeling is None and name.startswith("transformers."):
        with suppress(ImportError):
            modeling = importlib.import_module(name)
    if modeling is not None and name != config.__module__ and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS"):
        raise RegroupError(
            f'attn_implementation="{NAME}" does not support this family, which does not use the attention interface',
            layer=name.rpartition(".")[2],
            expected="a family that uses transformers' attention interface",
            remedy='load it with attn_implementation="eager", or "sdpa" if it supports that',
        )


def _without_zeros(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Replace the zero bias (1, H, T, S) that T5 allocates for cross-attention by one expanded zero."""

    @wraps(stock)
    def forward(
        self: Any,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> Any:
        if (
            position_bias is None
            and key_value_states is not None
            and not self.has_relative_attention_bias
            and self.config._attn_implementation == NAME
        ):
            shape = (1, self.n_heads, hidden_states.shape[1], key_value_states.shape[1])
            position_bias = hidden_states.new_zeros(()).expand(shape)
        return stock(self, hidden_states, mask, key_value_states, position_bias, past_key_values, **kwargs)

    forward.__dict__["regroup"] = True
    return forward


def register() -> None:
    """Register ``attn_implementation="regroup"`` with transformers. Further calls change nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    for attention in (T5Attention, MT5Attention):
        if not hasattr(attention.forward, "regroup"):
            attention.forward = _without_zeros(attention.forward)


register()
