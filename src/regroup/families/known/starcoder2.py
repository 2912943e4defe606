"""StarCoder2."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
        "starcoder2",
        kv_default=None,
        head_dim_default=None,
        rotary_share=1.0,
        keys_normed="never",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="all",
        ties=True,
        initializer_std=0.018042,
        gguf=None,
        vllm="stored",
    ),
)
