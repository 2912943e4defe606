"""The model that engines are compared on: the Llama shape of 1.1B parameters, with random weights. NumPy alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import numpy as np

HIDDEN, LAYERS, HEADS, HEAD_DIM, KV_HEADS, INTERMEDIATE, VOCABULARY = 2048, 22, 32, 64, 4, 5632, 32000
POSITIONS, EPSILON, ROPE_BASE = 4096, 1e-5, 10_000.0

# As config.json has it.
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": EPSILON,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

LAYER = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
NORMS = ("input_layernorm", "post_attention_layernorm")


def matrix(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Small random numbers, float32, the same for every engine."""
    # Layers must differ: an engine may keep equal weights once, and then reads less.
    generator = np.random.default_rng(zlib.crc32(name.encode()))
    block = generator.standard_normal(1 << 20, dtype=np.float32) * np.float32(0.02)
    return np.resize(block, shape)


def weights() -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor by its name in a checkpoint of transformers, float32."""
    yield "model.embed_tokens.weight", matrix("embed", (VOCABULARY, HIDDEN))
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        for name, shape in LAYER.items():
            yield f"{at}{name}.weight", matrix(f"{layer}{name}", shape)
        for name in NORMS:
            yield f"{at}{name}.weight", np.ones(HIDDEN, dtype=np.float32)
    yield "model.norm.weight", np.ones(HIDDEN, dtype=np.float32)
    yield "lm_head.weight", matrix("head", (VOCABULARY, HIDDEN))
