"""A Llama that is built from ``block_configs`` and tensors alone, as a serving engine builds it. No code of regroup's.

Written from the description of the layout: G = heads / n_heads_in_group, the width of the feed-forward layer two
thirds of ffn_mult times the hidden size, rounded up to a multiple of 256. Batches without padding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


def _norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + eps) * weight


def _rotate(states: Tensor, base: float) -> Tensor:
    """(B, heads, T, D), dimension i turning with i + D / 2."""
    T, D = states.shape[2:]
    angles = torch.arange(T)[:, None] * base ** (-torch.arange(0, D, 2) / D)
    one, two = states[..., : D // 2], states[..., D // 2 :]
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], dim=-1)


def _width(ffn: Mapping[str, Any], hidden: int) -> int:
    if "ffn_mult" not in ffn:
        return ffn["intermediate_size"]
    return math.ceil(int(2 * ffn["ffn_mult"] * hidden / 3) / 256) * 256


def block_llama_logits(config: Mapping[str, Any], weights: Mapping[str, Tensor], ids: Tensor) -> Tensor:
    """Logits (B, T, vocabulary) in float32 of token ids (B, T).

    Raises RuntimeError where a tensor does not have the shape that its block asks for.
    """
    H, hidden, eps = config["num_attention_heads"], config["hidden_size"], config["rms_norm_eps"]
    D = config.get("head_dim") or hidden // H
    base = config["rope_parameters"]["rope_theta"]
    states = weights["model.embed_tokens.weight"][ids]

    def linear(name: str, inputs: Tensor, rows: int, columns: int) -> Tensor:
        matrix = weights[f"{name}.weight"]
        if matrix.shape != (rows, columns):
            raise RuntimeError(f"{name}: {tuple(matrix.shape)} instead of {(rows, columns)}")
        return functional.linear(inputs, matrix, weights.get(f"{name}.bias"))

    for index, block in enumerate(config["block_configs"]):
        layer, n = f"model.layers.{index}", block["attention"]["n_heads_in_group"]
        G, width = H // n, _width(block["ffn"], hidden)
        inner = _norm(states, weights[f"{layer}.input_layernorm.weight"], eps)
        query, key, value = (
            linear(f"{layer}.self_attn.{part}_proj", inner, heads * D, hidden).unflatten(-1, (heads, D)).transpose(1, 2)
            for part, heads in (("q", H), ("k", G), ("v", G))
        )
        query, key = _rotate(query, base), _rotate(key, base)
        scores = torch.einsum("bgntd,bgsd->bgnts", query.unflatten(1, (G, n)), key) / math.sqrt(D)
        masked = scores + torch.full(scores.shape[-2:], -torch.inf).triu(1)
        mixed = torch.einsum("bgnts,bgsd->btgnd", masked.softmax(-1), value).flatten(2)
        states = states + linear(f"{layer}.self_attn.o_proj", mixed, hidden, H * D)
        inner = _norm(states, weights[f"{layer}.post_attention_layernorm.weight"], eps)
        gate = linear(f"{layer}.mlp.gate_proj", inner, width, hidden)
        up = linear(f"{layer}.mlp.up_proj", inner, width, hidden)
        states = states + linear(f"{layer}.mlp.down_proj", functional.silu(gate) * up, hidden, width)
    states = _norm(states, weights["model.norm.weight"], eps)
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    return functional.linear(states, weights[f"{head}.weight"])
