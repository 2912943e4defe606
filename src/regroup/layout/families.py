"""What is known of each family, as data: adding one means adding a row here (see docs/adding-a-family.md).

Facts were read from the transformers classes of the same ``model_type``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from .numbers import flag, natural, number
from .types import Packing

ALIBI = "ALiBi gives every query head a slope of its own by its number"


@dataclass(frozen=True)
class Family:
    """How a family names things in config.json and in its tensors.

    Attributes:
        module: path of the self-attention module below the base model; ``{i}`` is the decoder layer.
        prefixes: what may stand before it in tensor names.
        cross: path of the cross-attention module, for encoder-decoders.
        query, key, value, output: submodule names; ``fused`` replaces the first three.
        packing, conv1d: how a fused projection is laid out; GPT-2's Conv1D stores (in, out) instead of (out, in).
        heads, layers, hidden, kv_heads, head_dim: config keys, tried in order.
        kv_default: what transformers assumes where the config names no KV heads: ``"heads"``, or None for a number of
            its own that is not guessed here.
        head_dim_default: what it assumes where the config names no head_dim; None for hidden_size / heads.
        encoder_layers: config key with the number of encoder layers.
        native: KV heads that the stock class can hold: ``"any"``, ``"mqa"`` (1 or H), ``"none"`` (H only).
        pairs: which dimensions RoPE rotates together; None without RoPE.
        rotary_default: rotated share of a head where the config does not say.
        query_norm, key_norm: parameters per head after the projection: (name, indices a head, axis), where ``{head}``
            in the name stands for the head's number and size -1 for head_dim.
        position_bias: name of a table with a column per head below the attention module.
        shared_order: all decoder self-attention layers must keep one order of heads.
        ignored: parameters and buffers of the attention module that have no place per KV head.
        ties: whether the output head is the input embedding where the config does not say (``tie_word_embeddings``).
        always_ties: whether it is whatever the config says; a head that is stored and differs still counts.
        tied: parameters that are another one where the config ties, by full name: the output head first.
    """

    module: str
    prefixes: tuple[str, ...]
    cross: str | None = None
    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str = "o_proj"
    fused: str | None = None
    packing: Packing = "separate"
    conv1d: bool = False
    heads: tuple[str, ...] = ("num_attention_heads",)
    layers: tuple[str, ...] = ("num_hidden_layers",)
    hidden: tuple[str, ...] = ("hidden_size",)
    kv_heads: tuple[str, ...] = ()
    head_dim: tuple[str, ...] = ("head_dim",)
    kv_default: Literal["heads"] | None = "heads"
    head_dim_default: int | None = None
    encoder_layers: str | None = None
    native: Literal["any", "mqa", "none"] = "none"
    pairs: Literal["half", "interleaved"] | None = None
    rotary_default: float = 1.0
    query_norm: tuple[tuple[str, int], ...] = ()
    key_norm: tuple[tuple[str, int], ...] = ()
    position_bias: str | None = None
    shared_order: bool = False
    ignored: tuple[str, ...] = field(default=("rotary_emb.inv_freq",))
    ties: bool = False
    always_ties: bool = False
    tied: tuple[tuple[str, str], ...] = (("lm_head.weight", "model.embed_tokens.weight"),)


_LLAMA = Family(
    module="layers.{i}.self_attn",
    prefixes=("model.", ""),
    kv_heads=("num_key_value_heads",),
    native="any",
    pairs="half",
)
_SHARED = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
_T5 = Family(
    module="decoder.block.{i}.layer.0.SelfAttention",
    cross="decoder.block.{i}.layer.1.EncDecAttention",
    prefixes=("", "transformer."),
    query="q",
    key="k",
    value="v",
    output="o",
    heads=("num_heads", "num_attention_heads"),
    layers=("num_decoder_layers", "num_layers"),
    hidden=("d_model", "hidden_size"),
    head_dim=("d_kv", "head_dim"),
    head_dim_default=64,
    encoder_layers="num_layers",
    position_bias="relative_attention_bias.weight",
    shared_order=True,
    # Released files have a table in the first cross-attention module too, which no class reads.
    ignored=("relative_attention_bias.weight",),
    ties=True,
    always_ties=True,
    tied=tuple((name, "shared.weight") for name in ("lm_head.weight", *_SHARED)),
)
_BART = Family(
    module="decoder.layers.{i}.self_attn",
    cross="decoder.layers.{i}.encoder_attn",
    prefixes=("model.", ""),
    output="out_proj",
    heads=("decoder_attention_heads",),
    layers=("decoder_layers",),
    hidden=("d_model", "hidden_size"),
    encoder_layers="encoder_layers",
    ties=True,
    tied=(("lm_head.weight", "model.shared.weight"), *((f"model.{name}", "model.shared.weight") for name in _SHARED)),
)
_BLOOM = Family(
    module="h.{i}.self_attention",
    prefixes=("transformer.", ""),
    fused="query_key_value",
    output="dense",
    packing="interleaved",
    heads=("num_attention_heads", "n_head"),
    layers=("num_hidden_layers", "n_layer"),
    hidden=("hidden_size", "n_embed"),
    ties=True,
    tied=(("lm_head.weight", "transformer.word_embeddings.weight"),),
)

FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    # Llama weights whose config gives every layer its own number of KV heads (DeciLM).
    "deci": _LLAMA,
    "mistral": replace(_LLAMA, kv_default=None),
    "mixtral": replace(_LLAMA, kv_default=None),
    "qwen2": replace(_LLAMA, kv_default=None),
    "qwen2_moe": replace(_LLAMA, kv_default=None),
    "qwen3": replace(
        _LLAMA,
        kv_default=None,
        head_dim_default=128,
        ignored=("rotary_emb.inv_freq", "q_norm.weight", "k_norm.weight"),
    ),
    "gemma": replace(_LLAMA, kv_default=None, head_dim_default=256, ties=True),
    "gemma2": replace(_LLAMA, kv_default=None, head_dim_default=256, ties=True),
    "phi": replace(
        _LLAMA,
        output="dense",
        rotary_default=0.5,
        ignored=(
            "rotary_emb.inv_freq",
            "q_layernorm.weight",
            "q_layernorm.bias",
            "k_layernorm.weight",
            "k_layernorm.bias",
        ),
    ),
    "phi3": replace(_LLAMA, fused="qkv_proj", packing="stacked"),
    "starcoder2": replace(_LLAMA, kv_default=None, ties=True),
    "stablelm": replace(
        _LLAMA,
        kv_default=None,
        rotary_default=0.25,
        query_norm=(("q_layernorm.norms.{head}.weight", -1),),
        key_norm=(("k_layernorm.norms.{head}.weight", -1),),
    ),
    "olmo": _LLAMA,
    "olmo2": replace(_LLAMA, query_norm=(("q_norm.weight", -1),), key_norm=(("k_norm.weight", -1),)),
    "granite": _LLAMA,
    "cohere": replace(
        _LLAMA,
        pairs="interleaved",
        query_norm=(("q_norm.weight", 1),),
        key_norm=(("k_norm.weight", 1),),
        ties=True,
    ),
    "gpt_bigcode": Family(
        module="h.{i}.attn",
        prefixes=("transformer.", ""),
        fused="c_attn",
        output="c_proj",
        packing="interleaved",
        heads=("n_head", "num_attention_heads"),
        layers=("n_layer", "num_hidden_layers"),
        hidden=("n_embd", "hidden_size"),
        native="mqa",
        ignored=("bias", "masked_bias"),
        ties=True,
        tied=(("lm_head.weight", "transformer.wte.weight"),),
    ),
    "t5": _T5,
    "mt5": _T5,
    "umt5": replace(_T5, shared_order=False),
    "bart": _BART,
    "mbart": _BART,
    "pegasus": _BART,
    "marian": _BART,
    "m2m_100": _BART,
    "whisper": replace(_BART, tied=(("proj_out.weight", "model.decoder.embed_tokens.weight"),)),
    "opt": Family(
        module="decoder.layers.{i}.self_attn",
        prefixes=("model.", ""),
        output="out_proj",
        ties=True,
        tied=(("lm_head.weight", "model.decoder.embed_tokens.weight"),),
    ),
    "gpt2": Family(
        module="h.{i}.attn",
        prefixes=("transformer.", ""),
        fused="c_attn",
        output="c_proj",
        packing="stacked",
        conv1d=True,
        heads=("n_head", "num_attention_heads"),
        layers=("n_layer", "num_hidden_layers"),
        hidden=("n_embd", "hidden_size"),
        ignored=("bias", "masked_bias"),
        ties=True,
        tied=(("lm_head.weight", "transformer.wte.weight"),),
    ),
    "gpt_neox": Family(
        module="layers.{i}.attention",
        prefixes=("gpt_neox.", ""),
        fused="query_key_value",
        output="dense",
        packing="interleaved",
        pairs="half",
        rotary_default=0.25,
        ignored=("bias", "masked_bias", "rotary_emb.inv_freq"),
        tied=(("lm_head.weight", "gpt_neox.embed_in.weight"),),
    ),
    "bloom": _BLOOM,
    "falcon": replace(_BLOOM, native="mqa", pairs="half"),
}


def family_for(config: Mapping[str, Any]) -> Family | None:
    """The row for a config, with what single configs of a family change about it; None if it is unknown."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        return None
    if model_type == "falcon":
        if config.get("new_decoder_architecture"):
            family = replace(family, native="any", kv_heads=("num_kv_heads",))
        if config.get("alibi"):
            family = replace(family, pairs=None)
    return family


def ties(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the output head is the input embedding, as far as the config says."""
    return flag(config, "tie_word_embeddings", family.ties)


def stored_ties(family: Family, names: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of stored tensors, by their names, that are one parameter where the config ties: the output head first."""

    def stored(name: str) -> str | None:
        bare = (name.removeprefix(prefix) for prefix in family.prefixes)
        return next((one for one in (name, *bare) if one in names), None)

    pairs = ((stored(target), stored(source)) for target, source in family.tied)
    return [(target, source) for target, source in pairs if target is not None and source is not None]


def unsupported_reason(config: Mapping[str, Any]) -> str | None:
    """Why a config of a known family describes something that the family's row does not, or None."""
    model_type = config.get("model_type")
    if config.get("quantization_config"):
        return "its weights are quantised"
    if model_type in ("gpt2", "gpt_bigcode") and config.get("add_cross_attention"):
        return "a decoder of this family with added cross-attention is not described here"
    return None


def fixed_order(config: Mapping[str, Any]) -> str | None:
    """Why query heads of this config may not be reordered, or None."""
    if config.get("model_type") == "bloom" or (config.get("model_type") == "falcon" and config.get("alibi")):
        return ALIBI
    return None


def slow_output(config: Mapping[str, Any]) -> bool:
    """Whether transformers sums BLOOM's output projections part by part, which leaves out their biases."""
    parts = config.get("pretraining_tp", 1)
    return bool(
        config.get("model_type") == "bloom" and config.get("slow_but_exact") and isinstance(parts, int) and parts > 1
    )


def clipping(config: Mapping[str, Any]) -> str | None:
    """What clips queries, keys and values after their projections, or None."""
    return "clip_qkv clips every element" if config.get("model_type") == "olmo" and config.get("clip_qkv") else None


def residual_scale(config: Mapping[str, Any]) -> float | None:
    """Factor with which self-attention is added to the residual stream; None where a norm stands between."""
    if config.get("model_type") in ("gemma2", "olmo2"):
        return None
    if config.get("model_type") == "granite" and config.get("residual_multiplier") is not None:
        return number(config, "residual_multiplier", 1e6)
    return 1.0


def declared_kv_heads(config: Mapping[str, Any], family: Family, heads: int, layer: int) -> int | None:
    """KV heads of a layer that the config names, or None where it leaves them to transformers' default."""
    per_layer = config.get("num_key_value_heads_per_layer")
    if config.get("model_type") in ("deci", "llama") and isinstance(per_layer, list):
        return per_layer[layer] if layer < len(per_layer) else None
    if family.native == "mqa":
        # Falcon's default is multi-query, GPT-BigCode's too.
        return 1 if config.get("multi_query", True) else heads
    if family.native == "none":
        return heads
    for key in family.kv_heads:
        if config.get(key) is not None:
            return config[key]
    return heads if family.kv_default == "heads" else None


def sliding_window(config: Mapping[str, Any], layer: int) -> int | None:
    """Window of a layer in tokens, or None where it attends to everything before it."""
    if config.get("sliding_window") in (None, 0):  # Qwen 2 MoE writes 0 where it has none
        return None
    window, model_type = natural(config, ("sliding_window",)), config.get("model_type")
    kinds = config.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else None
    if model_type in ("mistral", "mixtral", "phi3", "starcoder2"):
        return window
    if model_type == "gemma2":
        return window if layer % 2 == 0 else None
    if model_type in ("qwen2", "qwen3") and config.get("use_sliding_window"):
        return window if layer >= config.get("max_window_layers", 28) else None
    if model_type == "qwen2_moe" and config.get("use_sliding_window"):
        return window if layer % 2 == 0 and layer < config.get("max_window_layers", 28) else None
    return None


def rotary_fraction(config: Mapping[str, Any], family: Family) -> float:
    """Share of each head's dimensions that RoPE rotates."""
    rope = config.get("rope_parameters")
    for place in (rope if isinstance(rope, dict) else {}, config):
        for key in ("partial_rotary_factor", "rotary_pct"):
            if place.get(key) is not None:
                return number(place, key, 1.0)
    return family.rotary_default


def initializer_std(config: Mapping[str, Any], hidden: int) -> float:
    """Standard deviation of the family's own fresh key and value projections."""
    if config.get("model_type") in ("t5", "mt5", "umt5"):
        scale = 1.0 if config.get("initializer_factor") is None else number(config, "initializer_factor", 1e6)
        return scale * hidden**-0.5
    for key in ("initializer_range", "init_std"):
        if config.get(key) is not None:
            return number(config, key, 1e6)
    return 0.02
