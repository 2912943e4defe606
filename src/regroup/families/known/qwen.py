"""Qwen 2, its mixture of experts, and Qwen 3, whose queries and keys pass a norm that all heads share."""

from __future__ import annotations

from dataclasses import replace

from .llama import llama_like

_QWEN2 = llama_like(
    "qwen2",
    kv_default=None,
    head_dim_default=None,
    rotary_share=1.0,
    keys_normed="never",
    clip=None,
    residual_normed=False,
    residual_multiplier=None,
    window="upper",
    ties=False,
    initializer_std=0.02,
    gguf="qwen2",
    vllm="stored",
)

FAMILIES = (
    _QWEN2,
    replace(_QWEN2, model_type="qwen2_moe", stock_type="qwen2_moe", window="lower even", gguf=None),
    llama_like(
        "qwen3",
        kv_default=None,
        head_dim_default=128,
        rotary_share=1.0,
        keys_normed="always",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="upper",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
        shared_norms=("q_norm.weight", "k_norm.weight"),
    ),
)
