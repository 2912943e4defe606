"""GPT-2, and GPT-BigCode (SantaCoder, StarCoder), which is GPT-2 with one KV head by default."""

from __future__ import annotations

from dataclasses import replace

from ..family import Family

_GPT2 = Family(
    model_type="gpt2",
    stock_type="gpt2",
    module="h.{i}.attn",
    cross=None,
    prefixes=("transformer.", ""),
    query="q_proj",
    key="k_proj",
    value="v_proj",
    output="c_proj",
    fused="c_attn",
    packing="stacked",
    conv1d=True,
    heads=("n_head", "num_attention_heads"),
    layers=("n_layer", "num_hidden_layers"),
    hidden=("n_embd", "hidden_size"),
    kv_heads=(),
    kv_heads_unread=(),
    kv_heads_by_layer=None,
    kv_default="heads",
    head_dim=("head_dim",),
    head_dim_default=None,
    encoder_layers=None,
    native="none",
    per_layer_obstacle=None,
    positions="absolute",
    pairs=None,
    rotary_share=1.0,
    query_norm=(),
    key_norm=(),
    shared_norms=(),
    keys_normed="never",
    clip=None,
    position_bias=None,
    shared_order=False,
    ignored=("bias", "masked_bias"),
    residual_normed=False,
    residual_multiplier=None,
    slow_output=False,
    window="none",
    ties=True,
    always_ties=False,
    tied=(("lm_head.weight", "transformer.wte.weight"),),
    initializer_std=0.02,
    t5_pretraining=False,
    speech=False,
    gguf=None,
    vllm="stored",
    aliases=(("n_head", "num_attention_heads"), ("n_layer", "num_hidden_layers"), ("n_embd", "hidden_size")),
    old_keys={},
    unsupported={"add_cross_attention": "a decoder of this family with added cross-attention is not described here"},
    switches={},
)

FAMILIES = (
    _GPT2,
    replace(
        _GPT2,
        model_type="gpt_bigcode",
        stock_type="gpt_bigcode",
        packing="interleaved",
        conv1d=False,
        native="mqa",
    ),
)
