"""Mistral and Mixtral."""

from __future__ import annotations

from dataclasses import replace

from .llama import llama_like

_MISTRAL = llama_like(
    "mistral",
    kv_default=None,
    head_dim_default=None,
    rotary_share=1.0,
    keys_normed="never",
    clip=None,
    residual_normed=False,
    residual_multiplier=None,
    window="all",
    ties=False,
    initializer_std=0.02,
    gguf="llama",
    vllm="stored",
)

FAMILIES = (
    _MISTRAL,
    replace(_MISTRAL, model_type="mixtral", stock_type="mixtral", gguf=None),
)
