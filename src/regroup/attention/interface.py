"""``attn_implementation="regroup"`` for the models of transformers that go through its attention interface.

Importing this module makes the name known, as do :func:`regroup.register` and ``regroup.load``.
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

# What some families pass to their attention function and this one does not compute.
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
        module: the attention module; its ``is_causal`` counts where the argument is not given.
        query, key, value: (B, H, T, D), (B, G, S, D), (B, G, S, Dv).
        attention_mask: what :func:`attention_mask` made, or any mask that broadcasts to (B, H, T, S), bool or added.
            A mask says everything about positions; ``is_causal`` and ``sliding_window`` count without one.
        position_bias: added to the scores, broadcasts to (B, H, T, S). One that is the same for all keys by its
            strides is left out: softmax does not see it.
        dropout: in training, of attention weights.

    Returns:
        (B, T, H, Dv), contiguous, and None instead of weights.

    Raises:
        RegroupError: the family passes something that is not computed here (sinks).
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
    """Say once, as transformers' ``sdpa`` does, that weights were asked for and there are none.

    Some families (GPT-2, OPT) keep the argument to themselves; what transformers collects tells of it in all.
    """
    collector = getattr(output_capturing, "_active_collector", None)
    collected = (None if collector is None else collector.get()) or ()
    if kwargs.get("output_attentions") or any("attentions" in name for name in collected):
        logger.warning_once(
            f'attn_implementation="{NAME}" has no attention weights, and `output_attentions=True` gives none. '
            'Use attn_implementation="eager" for them.'
        )


def _refusal(module: nn.Module, what: str, got: str) -> RegroupError:
    return RegroupError(
        f'attn_implementation="{NAME}" does not have {what}',
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
    """A mask only where attention needs one, as transformers asks for it: bool (B, 1, T, S), True may attend, or None.

    None where ``is_causal``, by the last query, says it all: no padding, and no key that a window or a chunk hides.
    Beside the arguments of transformers' ``sdpa_mask``, this sees to the order of slots of a full window
    (:class:`~regroup.attention.cache.SlidingKVLayer`).

    Raises:
        RegroupError: the model's class does not go through the attention interface, and would ignore or misread it.
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
        allow_is_causal_skip=False,  # its rules align the first query with the first key
        **kwargs,
    )
    if mask is not None and slots is not None:
        slots.order.position = q_offset
        mask = mask.roll(slots % slots.window, -1)
    return mask


def _is_plain(q_length: int, kv_length: int, q_offset: Any, kv_offset: int, padding: Tensor | None) -> bool:
    """Whether the last query is at the last key, and no key is padding; of a graph, whenever it runs."""
    if isinstance(q_offset, Tensor) or is_traced() or not is_certain(q_offset + q_length == kv_offset + kv_length):
        return False
    if padding is None:
        return True
    if is_tracing(padding) or padding.shape[-1] < kv_offset + kv_length:
        return False
    return bool(padding[:, kv_offset : kv_offset + kv_length].all())


@cache
def check_family(config: type) -> None:
    """Refuse the families that would take the mask and not the attention function, by their configuration's class.

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
            f'attn_implementation="{NAME}" cannot serve a family that does not use the attention interface',
            layer=name.rpartition(".")[2],
            expected="a family whose attention goes through the interface",
            remedy='load it with attn_implementation="eager", or "sdpa" where it has that',
        )


def _without_zeros(stock: Callable[..., Any]) -> Callable[..., Any]:
    """T5's attention makes a bias of zeros (1, H, T, S) for cross-attention; here it is one number, seen S times."""

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
    """Make ``attn_implementation="regroup"`` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, attention_mask)
    for attention in (T5Attention, MT5Attention):
        if not hasattr(attention.forward, "regroup"):
            attention.forward = _without_zeros(attention.forward)


register()
