"""Granite 3."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
        "granite",
        kv_default="heads",
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="never",
        clip=None,
        residual_normed=False,
        residual_multiplier="residual_multiplier",
        window="none",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
    ),
)
