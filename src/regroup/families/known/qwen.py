"""Qwen 2, its mixture of experts, and Qwen 3, whose queries and keys pass a norm that all heads share."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
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
    ),
    llama_like(
        "qwen2_moe",
        kv_default=None,
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="never",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="lower even",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
    ),
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
