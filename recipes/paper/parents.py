"""Models that are pre-trained from nothing, as checkpoint folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from .settings import Shape
from .texts import END, PAD


def new_encoder_decoder(shape: Shape, vocabulary: int) -> T5ForConditionalGeneration:
    """A random T5 1.1: relative position bias, gated GELU, a head of its own that does not scale what enters it."""
    config = T5Config(
        vocab_size=vocabulary,
        d_model=shape.hidden,
        d_kv=shape.head_dim,
        d_ff=shape.feed_forward,
        num_layers=shape.layers,
        num_decoder_layers=shape.layers,
        num_heads=shape.heads,
        dropout_rate=0.0,  # as T5 1.1 was pre-trained
        feed_forward_proj="gated-gelu",
        pad_token_id=PAD,
        eos_token_id=END,
    )
    config.decoder_start_token_id = PAD
    # transformers ties every new model; a T5 1.1 is one whose config says otherwise, with a head that was cut loose.
    config.scale_decoder_outputs = False
    model = T5ForConditionalGeneration(config)
    model.lm_head.weight = nn.Parameter(torch.empty_like(model.shared.weight))
    model.all_tied_weights_keys.pop("lm_head.weight")
    config.tie_word_embeddings = False
    for embedding in (model.shared, model.lm_head):
        nn.init.normal_(embedding.weight, std=config.d_model**-0.5)
    return model


def new_decoder(shape: Shape, vocabulary: int, positions: int) -> LlamaForCausalLM:
    """A random Llama with rotary positions."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.feed_forward,
            num_hidden_layers=2 * shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.heads,
            head_dim=shape.head_dim,
            max_position_embeddings=positions,
            initializer_range=shape.hidden**-0.5,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
        )
    )


def write_new(family: str, shape: Shape, tokenizer: Path, folder: Path, *, positions: int) -> None:
    """A randomly initialised multi-head model with its tokenizer; equal every time."""
    torch.manual_seed(0)
    made = PreTrainedTokenizerFast.from_pretrained(tokenizer, trust_remote_code=False)
    model: Any
    if family == "encoder-decoder":
        model = new_encoder_decoder(shape, len(made))
    else:
        model = new_decoder(shape, len(made), positions)
    model.save_pretrained(folder)
    made.save_pretrained(folder)
