"""Command R."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
        "cohere",
        kv_default="heads",
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="use_qk_norm",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="none",
        ties=True,
        initializer_std=0.02,
        gguf=None,
        vllm="embedding",
        pairs="interleaved",
        query_norm=(("q_norm.weight", 1),),
        key_norm=(("k_norm.weight", 1),),
    ),
)
