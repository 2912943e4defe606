"""OLMo, which may clip, and OLMo 2, which norms queries, keys and what is added to the residual stream."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
        "olmo",
        kv_default="heads",
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="never",
        clip="clip_qkv",
        residual_normed=False,
        residual_multiplier=None,
        window="none",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
    ),
    llama_like(
        "olmo2",
        kv_default="heads",
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="always",
        clip=None,
        residual_normed=True,
        residual_multiplier=None,
        window="none",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
        query_norm=(("q_norm.weight", -1),),
        key_norm=(("k_norm.weight", -1),),
    ),
)
