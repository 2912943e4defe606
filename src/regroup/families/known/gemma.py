"""Gemma and Gemma 2, which norms what attention adds to the residual stream."""

from __future__ import annotations

from dataclasses import replace

from .llama import llama_like

_GEMMA = llama_like(
    "gemma",
    kv_default=None,
    head_dim_default=256,
    rotary_share=1.0,
    keys_normed="never",
    clip=None,
    residual_normed=False,
    residual_multiplier=None,
    window="none",
    ties=True,
    initializer_std=0.02,
    gguf=None,
    vllm="embedding",
)

FAMILIES = (
    _GEMMA,
    replace(_GEMMA, model_type="gemma2", stock_type="gemma2", residual_normed=True, window="even"),
)
