"""StableLM, which may norm each head of the queries and keys by itself."""

from __future__ import annotations

from .llama import llama_like

FAMILIES = (
    llama_like(
        "stablelm",
        kv_default=None,
        head_dim_default=None,
        rotary_share=0.25,
        keys_normed="qk_layernorm",
        clip=None,
        residual_normed=False,
        residual_multiplier=None,
        window="none",
        ties=False,
        initializer_std=0.02,
        gguf=None,
        vllm="stored",
        query_norm=(("q_layernorm.norms.{head}.weight", -1),),
        key_norm=(("k_layernorm.norms.{head}.weight", -1),),
        old_keys={"rope_pct": "partial_rotary_factor", "norm_eps": "layer_norm_eps"},
    ),
)
