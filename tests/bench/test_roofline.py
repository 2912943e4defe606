"""Bytes, FLOPs and floors against numbers counted by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from regroup.bench.roofline import (
    Cost,
    Experts,
    Weights,
    attention_flops,
    operator_cost,
    weights_cost,
)
from regroup.layout.kv_cache import kv_cache_bytes


@dataclass(frozen=True)
class Layer:
    num_attention_heads: int = 6
    num_key_value_heads: int = 3
    head_dim: int = 10
    kind: str = "self"
    window: int | None = None


def test_the_operator_counted_by_hand() -> None:
    """Batch 8, context 4096, 32 heads of 128, float32: 1 GiB of KV for multi-head attention, a 32nd for multi-query."""
    shape = {"batch": 8, "heads": 32, "head_dim": 128, "context": 4096, "dtype": "float32"}
    many, one = operator_cost(kv_heads=32, **shape), operator_cost(kv_heads=1, **shape)
    assert many.nbytes == 2**30
    assert one.nbytes == 2**25
    assert many.flops == one.flops == 536_870_912
    # 26 GB/s and 240 GFLOP/s: 41 ms of reading; at one KV head arithmetic binds, 2.2 ms.
    assert many.floor(26e9, 240e9) == pytest.approx(41.3e-3, rel=0.01)
    assert one.floor(26e9, 240e9) == pytest.approx(2.24e-3, rel=0.01)
    assert one.nbytes / 26e9 < one.floor(26e9, 240e9)


def test_values_of_another_width() -> None:
    # Two sequences, one KV head, 5 tokens, keys of 4 and values of 6 numbers of 2 bytes; 3 query heads.
    cost = operator_cost(batch=2, heads=3, kv_heads=1, head_dim=4, value_dim=6, context=5, dtype="bfloat16")
    assert cost == Cost(2 * 5 * (4 + 6) * 2, 2 * 3 * 5 * (2 * 4 + 2 * 6))


def test_only_cached_tokens_are_read() -> None:
    layers = (Layer(), Layer(window=7), Layer(kind="cross"))
    # Of 3 KV heads of 10: 20, 7 and 11 tokens.
    read = kv_cache_bytes(layers, context=20, encoder_context=11, batch=2, dtype="float32")
    assert read == 2 * 3 * 10 * (20 + 7 + 11) * 2 * 4
    assert attention_flops(layers, context=20, encoder_context=11, batch=2) == 4 * 6 * 10 * (20 + 7 + 11) * 2


def test_kv_heads_change_bytes_and_not_flops() -> None:
    one = replace(Layer(), num_key_value_heads=1)
    assert kv_cache_bytes([one], context=9) * 3 == kv_cache_bytes([Layer()], context=9)
    assert attention_flops([one], context=9) == attention_flops([Layer()], context=9)


def test_weights_are_read_once_for_a_batch_and_multiplied_for_each() -> None:
    weights = Weights(parameters=110, multiplied=100)
    assert weights_cost(weights, batch=1, dtype="float32") == Cost(440, 200)
    assert weights_cost(weights, batch=8, dtype="bfloat16") == Cost(220, 1600)


def test_only_used_experts_are_read() -> None:
    weights = Weights(0, 0, Experts(parameters=800, number=8, chosen=2))
    # One token goes to 2 of 8: a quarter. Two tokens miss an expert with probability (6/8)².
    assert weights_cost(weights, batch=1, dtype="float32") == Cost(800, 400)
    assert weights_cost(weights, batch=2, dtype="float32") == Cost(round(4 * 800 * (1 - 0.75**2)), 800)
    assert weights_cost(weights, batch=1000, dtype="float32").nbytes == 3200
