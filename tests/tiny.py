"""Tiny random checkpoints of every family that `regroup` knows, made in code.

The shapes are awkward on purpose: odd head counts, ``head_dim`` that is not ``hidden_size / heads``, partial rotary
embeddings, biases and norms that are neither zero nor one, encoders with other head counts than their decoders.
Weights are large, so that logits are sensitive to attention and a wrong head shows.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

Kind = Literal["causal", "seq2seq", "speech"]

VOCAB_SIZE = 96
MAX_POSITIONS = 64
SPEECH_FRAMES = 24
_SPECIAL_TOKENS = 3  # pad 0, bos 1, eos 2


@dataclass(frozen=True)
class TinyFamily:
    """One tiny checkpoint: which classes, which configuration, and what a test has to know of its heads."""

    model_type: str
    config_class: str
    model_class: str
    kwargs: Mapping[str, Any]
    kind: Kind = "causal"
    num_attention_heads: int = 6
    num_key_value_heads: int = 6
    num_hidden_layers: int = 2
    head_dim: int = 8
    weight_std: float = 0.2
    untied_head: bool = False
    attention_paths: tuple[str, ...] = field(default=("layers.{}.self_attn",))

    @property
    def attention_modules(self) -> list[str]:
        """Paths, relative to ``model.base_model``, of every attention module that a conversion regroups."""
        return [path.format(i) for i in range(self.num_hidden_layers) for path in self.attention_paths]


_TOKENS = {"vocab_size": VOCAB_SIZE, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_CAUSAL = {
    **_TOKENS,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 6,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": False,
}


def _causal(model_type: str, stem: str, *, like: Mapping[str, Any] = _CAUSAL, **kwargs: Any) -> TinyFamily:
    """A family whose configuration spells its sizes as Llama does."""
    facts = {k: kwargs.pop(k) for k in ("attention_paths", "weight_std") if k in kwargs}
    config = {**like, **kwargs}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return TinyFamily(
        model_type,
        f"{stem}Config",
        f"{stem}ForCausalLM",
        config,
        num_attention_heads=heads,
        num_key_value_heads=config.get("num_key_value_heads", heads),
        num_hidden_layers=config["num_hidden_layers"],
        head_dim=config.get("head_dim", hidden // heads),
        **facts,
    )


_MHA = {k: v for k, v in _CAUSAL.items() if k not in ("num_key_value_heads", "intermediate_size")}


def _t5(model_type: str, stem: str, *, untied_head: bool = False, **kwargs: Any) -> TinyFamily:
    config = {
        **_TOKENS,
        "d_model": 40,
        "d_kv": 6,
        "d_ff": 48,
        "num_layers": 3,  # not fewer than the decoder's: the stock generate() makes a cache of num_layers layers
        "num_decoder_layers": 2,
        "num_heads": 6,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "dropout_rate": 0.0,
        "feed_forward_proj": "gated-gelu",
        "decoder_start_token_id": 0,
        **kwargs,
    }
    return TinyFamily(
        model_type,
        f"{stem}Config",
        f"{stem}ForConditionalGeneration",
        config,
        kind="seq2seq",
        num_hidden_layers=2,
        head_dim=6,
        weight_std=0.15,
        untied_head=untied_head,
        attention_paths=("decoder.block.{}.layer.0.SelfAttention", "decoder.block.{}.layer.1.EncDecAttention"),
    )


_ENCODER_DECODER_PATHS = ("decoder.layers.{}.self_attn", "decoder.layers.{}.encoder_attn")


def _bart(
    model_type: str, stem: str, *, kind: Kind = "seq2seq", head: str = "ForConditionalGeneration", **kwargs: Any
) -> TinyFamily:
    config = {
        **_TOKENS,
        "d_model": 48,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 6,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 56,
        "max_position_embeddings": MAX_POSITIONS,
        "encoder_layerdrop": 0.0,
        "decoder_layerdrop": 0.0,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "decoder_start_token_id": 2,
        "forced_eos_token_id": None,
        **kwargs,
    }
    return TinyFamily(
        model_type,
        f"{stem}Config",
        f"{stem}{head}",
        config,
        kind=kind,
        num_hidden_layers=3,
        attention_paths=_ENCODER_DECODER_PATHS,
    )


def _gpt2(model_type: str, stem: str, **kwargs: Any) -> TinyFamily:
    config = {
        **_TOKENS,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 6,
        "n_positions": MAX_POSITIONS,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        **kwargs,
    }
    return TinyFamily(
        model_type,
        f"{stem}Config",
        f"{stem}LMHeadModel" if stem == "GPT2" else f"{stem}ForCausalLM",
        config,
        num_hidden_layers=3,
        attention_paths=("h.{}.attn",),
    )


def _falcon(**kwargs: Any) -> TinyFamily:
    return _causal(
        "falcon",
        "Falcon",
        like=_MHA,
        multi_query=False,
        new_decoder_architecture=False,
        tie_word_embeddings=True,
        attention_paths=("h.{}.self_attention",),
        **kwargs,
    )


_GROUPED: dict[str, Any] = {"num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 6}
_MOE: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24}
_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10_000.0}

FAMILIES: dict[str, TinyFamily] = {
    "llama": _causal("llama", "Llama", num_hidden_layers=3, head_dim=10),
    "llama_bias": _causal("llama", "Llama", num_attention_heads=3, num_key_value_heads=3, attention_bias=True),
    "llama_grouped": _causal("llama", "Llama", num_hidden_layers=3, **_GROUPED),
    "mistral": _causal("mistral", "Mistral", head_dim=12, sliding_window=6),
    "mistral_grouped": _causal("mistral", "Mistral", **{**_GROUPED, "num_key_value_heads": 4}, sliding_window=None),
    "mixtral": _causal("mixtral", "Mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=10),
    "qwen2": _causal(
        "qwen2",
        "Qwen2",
        tie_word_embeddings=True,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
        num_hidden_layers=3,
    ),
    "qwen2_moe": _causal("qwen2_moe", "Qwen2Moe", num_experts=4, mlp_only_layers=[0], **_MOE),
    "qwen3": _causal("qwen3", "Qwen3", head_dim=12, attention_bias=True, tie_word_embeddings=True),
    "gemma": _causal(
        "gemma",
        "Gemma",
        hidden_size=45,
        num_attention_heads=9,
        num_key_value_heads=9,
        head_dim=8,
        tie_word_embeddings=True,
    ),
    "gemma2": _causal(
        "gemma2",
        "Gemma2",
        head_dim=12,
        query_pre_attn_scalar=10,
        sliding_window=5,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=30.0,
        tie_word_embeddings=True,
    ),
    "gemma2_grouped": _causal(
        "gemma2", "Gemma2", **_GROUPED, query_pre_attn_scalar=6, sliding_window=5, tie_word_embeddings=True
    ),
    "phi": _causal("phi", "Phi", rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}),
    "phi_norm": _causal(
        "phi", "Phi", rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}, qk_layernorm=True, num_hidden_layers=3
    ),
    "phi3": _causal("phi3", "Phi3", original_max_position_embeddings=MAX_POSITIONS, sliding_window=7),
    "phi3_grouped": _causal(
        "phi3",
        "Phi3",
        original_max_position_embeddings=MAX_POSITIONS,
        num_attention_heads=12,
        num_key_value_heads=6,
        hidden_size=96,
    ),
    "starcoder2": _causal("starcoder2", "Starcoder2", tie_word_embeddings=True, sliding_window=6, use_bias=True),
    "starcoder2_grouped": _causal(
        "starcoder2",
        "Starcoder2",
        tie_word_embeddings=True,
        num_attention_heads=12,
        num_key_value_heads=4,
        hidden_size=72,
    ),
    "stablelm": _causal(
        "stablelm", "StableLm", use_qkv_bias=True, rope_parameters={**_ROPE, "partial_rotary_factor": 0.5}
    ),
    "stablelm_norm": _causal(
        "stablelm",
        "StableLm",
        qk_layernorm=True,
        use_parallel_residual=True,
        rope_parameters={**_ROPE, "partial_rotary_factor": 0.25},
    ),
    "olmo": _causal("olmo", "Olmo", clip_qkv=1.2, num_attention_heads=12, num_key_value_heads=12),
    "olmo2": _causal("olmo2", "Olmo2", num_attention_heads=12, num_key_value_heads=12, hidden_size=72),
    "granite": _causal(
        "granite",
        "Granite",
        attention_bias=True,
        mlp_bias=True,
        embedding_multiplier=2.0,
        attention_multiplier=0.3,
        residual_multiplier=0.7,
        logits_scaling=0.5,
        tie_word_embeddings=True,
    ),
    "cohere": _causal("cohere", "Cohere", attention_bias=True, logit_scale=0.5, tie_word_embeddings=True),
    "cohere_norm": _causal(
        "cohere", "Cohere", use_qk_norm=True, logit_scale=0.5, tie_word_embeddings=True, num_hidden_layers=3
    ),
    "t5": _t5("t5", "T5", feed_forward_proj="relu"),
    "t5_v1_1": _t5("t5", "T5", tie_word_embeddings=False, untied_head=True),
    "mt5": _t5("mt5", "MT5", untied_head=True),
    "umt5": _t5("umt5", "UMT5"),
    "bart": _bart("bart", "Bart"),
    "mbart": _bart("mbart", "MBart", scale_embedding=True),
    "pegasus": _bart("pegasus", "Pegasus", decoder_start_token_id=0),
    "marian": _bart("marian", "Marian", head="MTModel", decoder_start_token_id=0, activation_function="swish"),
    "m2m_100": _bart("m2m_100", "M2M100", scale_embedding=True),
    "whisper": _bart(
        "whisper",
        "Whisper",
        kind="speech",
        num_mel_bins=10,
        max_source_positions=SPEECH_FRAMES // 2,
        max_target_positions=MAX_POSITIONS,
        suppress_tokens=None,
        begin_suppress_tokens=None,
        decoder_start_token_id=1,
    ),
    "opt": _causal("opt", "OPT", like=_MHA, ffn_dim=64, dropout=0.0, attention_paths=("decoder.layers.{}.self_attn",)),
    "opt_post_norm": _causal(
        "opt",
        "OPT",
        like=_MHA,
        ffn_dim=64,
        dropout=0.0,
        do_layer_norm_before=False,
        word_embed_proj_dim=32,
        tie_word_embeddings=True,
        num_hidden_layers=3,
        attention_paths=("decoder.layers.{}.self_attn",),
    ),
    "gpt2": _gpt2("gpt2", "GPT2"),
    "gpt2_upcast": _gpt2("gpt2", "GPT2", reorder_and_upcast_attn=True, scale_attn_by_inverse_layer_idx=True),
    "gpt_neox": _causal(
        "gpt_neox",
        "GPTNeoX",
        like=_MHA,
        intermediate_size=64,
        hidden_size=72,
        num_attention_heads=9,
        rope_parameters={**_ROPE, "partial_rotary_factor": 0.25},
        attention_paths=("layers.{}.attention",),
    ),
    "gpt_neox_sequential": _causal(
        "gpt_neox",
        "GPTNeoX",
        like=_MHA,
        intermediate_size=64,
        use_parallel_residual=False,
        attention_bias=False,
        num_hidden_layers=3,
        rope_parameters={**_ROPE, "partial_rotary_factor": 1.0},
        attention_paths=("layers.{}.attention",),
    ),
    "bloom": TinyFamily(
        "bloom",
        "BloomConfig",
        "BloomForCausalLM",
        {**_TOKENS, "hidden_size": 72, "n_layer": 2, "n_head": 9},
        num_attention_heads=9,
        num_key_value_heads=9,
        attention_paths=("h.{}.self_attention",),
    ),
    "falcon": _falcon(parallel_attn=True, bias=True),
    "falcon_sequential": _falcon(parallel_attn=False, bias=False, num_hidden_layers=3),
    "falcon_alibi": _falcon(alibi=True, parallel_attn=False, bias=True),
    "gpt_bigcode": _gpt2("gpt_bigcode", "GPTBigCode", multi_query=False),
}


def build(
    name: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The family's stock model in evaluation mode, with the same random weights on every call."""
    family = FAMILIES[name]
    config = getattr(transformers, family.config_class)(**family.kwargs)
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = getattr(transformers, family.model_class)(config)
    if family.untied_head:
        head = model.get_output_embeddings()
        assert isinstance(head, torch.nn.Linear)
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    randomize(model, std=family.weight_std, seed=seed)
    return cast(Any, model).to(dtype).eval()


@torch.no_grad()
def randomize(model: PreTrainedModel, *, std: float, seed: int) -> None:
    """Fill every trainable weight that a checkpoint stores: matrices and biases N(0, std²), norm scales around 1."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:  # sinusoidal tables: computed, and often not stored
            continue
        generator = torch.Generator().manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
        noise = torch.randn(parameter.shape, generator=generator)
        is_scale = bool((parameter == 1).all())
        parameter.copy_(1 + 0.3 * noise if is_scale else std * noise)


def save(
    name: str,
    folder: Path | str,
    *,
    dtype: torch.dtype = torch.float32,
    max_shard_size: int | str | None = None,
    seed: int = 0,
) -> Path:
    """Write the family's checkpoint with ``save_pretrained`` and return its folder."""
    kwargs: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    build(name, seed=seed, dtype=dtype).save_pretrained(folder, **kwargs)
    return Path(folder)


def inputs(name: str, batch: int, length: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Random arguments for ``model(**inputs)``: ``batch`` rows, ``length`` positions for the decoder, no padding."""
    family = FAMILIES[name]
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> Tensor:
        return torch.randint(_SPECIAL_TOKENS, VOCAB_SIZE, (batch, count), generator=generator)

    if family.kind == "causal":
        ids = tokens(length)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family.kind == "speech":
        features = torch.randn(batch, family.kwargs["num_mel_bins"], SPEECH_FRAMES, generator=generator)
        return {"input_features": features, "decoder_input_ids": tokens(length)}
    ids = tokens(length + 3)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": tokens(length)}
