"""Phi-1 to Phi-2, and Phi-3 with one projection for queries, keys and values."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
        "phi",
        kv_default="heads",
        head_dim_default=None,
        rotary_share=0.5,
        keys_normed="qk_layernorm",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="none",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
        output="dense",
        shared_norms=("q_layernorm.weight", "q_layernorm.bias", "k_layernorm.weight", "k_layernorm.bias"),
        old_keys={"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_embd": "hidden_size"},
    ),
    llama_like(
        "phi3",
        kv_default="heads",
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="never",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="all",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
        fused="qkv_proj",
        packing="stacked",
    ),
)
