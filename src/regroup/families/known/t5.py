"""T5 (v1.1 and FLAN-T5 included), mT5 and UMT5."""

from __future__ import annotations

from dataclasses import replace

from ..family import Family

_T5 = Family(
    model_type="t5",
    stock_type="t5",
    module="decoder.block.{i}.layer.0.SelfAttention",
    cross="decoder.block.{i}.layer.1.EncDecAttention",
    prefixes=("", "transformer."),
    query="q",
    key="k",
    value="v",
    output="o",
    fused=None,
    packing="separate",
    conv1d=False,
    heads=("num_heads", "num_attention_heads"),
    layers=("num_decoder_layers", "num_layers"),
    hidden=("d_model", "hidden_size"),
    kv_heads=(),
    kv_heads_unread=(),
    kv_heads_by_layer=None,
    kv_default="heads",
    head_dim=("d_kv", "head_dim"),
    head_dim_default=64,
    encoder_layers="num_layers",
    native="none",
    per_layer_obstacle=None,
    positions="relative",
    pairs=None,
    rotary_share=1.0,
    query_norm=(),
    key_norm=(),
    shared_norms=(),
    keys_normed="never",
    clip=None,
    position_bias="relative_attention_bias.weight",
    shared_order=True,
    # Released files have a table in the first cross-attention module too, which no class reads.
    ignored=("relative_attention_bias.weight",),
    residual_normed=False,
    residual_multiplier=None,
    slow_output=False,
    window="none",
    ties=True,
    always_ties=True,
    tied=(
        ("lm_head.weight", "shared.weight"),
        ("encoder.embed_tokens.weight", "shared.weight"),
        ("decoder.embed_tokens.weight", "shared.weight"),
    ),
    initializer_std=None,
    t5_pretraining=True,
    speech=False,
    gguf=None,
    vllm="none",
    aliases=(("num_heads", "num_attention_heads"), ("d_model", "hidden_size"), ("d_kv", "head_dim")),
    old_keys={},
    unsupported={},
    switches={},
)

FAMILIES = (
    _T5,
    replace(_T5, model_type="mt5", stock_type="mt5"),
    # It has a table of position biases in each layer.
    replace(_T5, model_type="umt5", stock_type="umt5", shared_order=False),
)
