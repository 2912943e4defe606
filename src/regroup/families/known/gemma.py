"""Gemma and Gemma 2, which norms what attention adds to the residual stream."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
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
    ),
    llama_like(
        "gemma2",
        kv_default=None,
        head_dim_default=256,
        rotary_share=1.0,
        keys_normed="never",
        clip=None,
        residual_normed=True,
        residual_multiplier=None,
        window="even",
        ties=True,
        initializer_std=0.02,
        gguf=None,
        vllm="embedding",
    ),
)
