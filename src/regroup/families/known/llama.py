"""Llama, and what other families share with it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from ..family import Family


def llama_like(
    model_type: str,
    *,
    kv_default: Literal["heads"] | None,
    head_dim_default: int | None,
    rotary_share: float,
    keys_normed: str,
    clip: str | None,
    residual_normed: bool,
    residual_multiplier: str | None,
    window: Literal["none", "all", "even", "upper", "lower even"],
    ties: bool,
    initializer_std: float,
    gguf: str | None,
    vllm: Literal["stored", "embedding", "none"],
    **different: Any,
) -> Family:
    """A decoder with Llama's names, rotary positions and grouped heads in its stock class.

    The named arguments are what such families differ in, so each must state them (see ``Family``); ``different``
    replaces what Llama's names and class would say.
    """
    facts: Mapping[str, Any] = {
        "stock_type": model_type,
        "module": "layers.{i}.self_attn",
        "cross": None,
        "prefixes": ("model.", ""),
        "query": "q_proj",
        "key": "k_proj",
        "value": "v_proj",
        "output": "o_proj",
        "fused": None,
        "packing": "separate",
        "conv1d": False,
        "heads": ("num_attention_heads",),
        "layers": ("num_hidden_layers",),
        "hidden": ("hidden_size",),
        "kv_heads": ("num_key_value_heads",),
        "kv_heads_unread": (),
        "kv_heads_by_layer": None,
        "head_dim": ("head_dim",),
        "encoder_layers": None,
        "native": "any",
        "per_layer_obstacle": None,
        "positions": "rotary",
        "pairs": "half",
        "query_norm": (),
        "key_norm": (),
        "shared_norms": (),
        "position_bias": None,
        "shared_order": False,
        "ignored": ("rotary_emb.inv_freq",),
        "slow_output": False,
        "always_ties": False,
        "tied": (("lm_head.weight", "model.embed_tokens.weight"),),
        "t5_pretraining": False,
        "speech": False,
        "aliases": (),
        "old_keys": {},
        "unsupported": {},
        "switches": {},
    }
    return Family(
        model_type=model_type,
        kv_default=kv_default,
        head_dim_default=head_dim_default,
        rotary_share=rotary_share,
        keys_normed=keys_normed,
        clip=clip,
        residual_normed=residual_normed,
        residual_multiplier=residual_multiplier,
        window=window,
        ties=ties,
        initializer_std=initializer_std,
        gguf=gguf,
        vllm=vllm,
        **{**facts, **different},
    )


def _llama(model_type: str) -> Family:
    return llama_like(
        model_type,
        kv_default="heads",
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="never",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="none",
        ties=False,
        initializer_std=0.02,
        gguf="llama",
        vllm="stored",
        stock_type="llama",
        kv_heads_by_layer="num_key_value_heads_per_layer",
    )


# deci: Llama weights whose config gives each layer its own number of KV heads (DeciLM).
FAMILIES = (_llama("llama"), _llama("deci"))
