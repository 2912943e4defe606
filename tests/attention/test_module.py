"""``GroupedQueryAttention``: a drop-in layer that agrees with Llama's and with attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

import regroup
from regroup.attention.cache import KVLayer, SlidingKVLayer
from regroup.attention.module import GroupedQueryAttention
from regroup.errors import RegroupError


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(*args: Any, **kwargs: Any) -> GroupedQueryAttention:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return GroupedQueryAttention(*args, **kwargs)


def written_out(layer: GroupedQueryAttention, states: Tensor, memory: Tensor, seen: Tensor) -> Tensor:
    """Head by head, query by query; ``seen`` (T, S) bool."""
    outputs = []
    for row, source in zip(states, memory, strict=True):
        heads = []
        for head in range(layer.num_heads):
            group = head // (layer.num_heads // layer.num_key_value_heads)
            D = layer.head_dim
            query = layer.q_proj(row)[:, head * D : (head + 1) * D]
            key, value = (p(source)[:, group * D : (group + 1) * D] for p in (layer.k_proj, layer.v_proj))
            scores = (query @ key.T / D**0.5).masked_fill(~seen, float("-inf"))
            heads.append(scores.softmax(-1) @ value)
        outputs.append(layer.o_proj(torch.cat(heads, -1)))
    return torch.stack(outputs)


@torch.no_grad()
@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("window", [None, 3])
def test_self_attention_is_what_is_written_down(groups: int, window: int | None) -> None:
    layer = build(20, 6, groups, 5, bias=True, window=window)
    states = numbers(2, 7, 20)
    distance = torch.arange(7)[:, None] - torch.arange(7)[None, :]
    seen = (distance >= 0) & (distance < (window or 8))
    torch.testing.assert_close(layer(states), written_out(layer, states, states, seen), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(layer(states), written_out(layer, states, states, seen | True), atol=1e-3)


@torch.no_grad()
def test_cross_attention_and_its_cache() -> None:
    layer = build(20, 4, 2, 6, memory_size=9)
    states, memory = numbers(2, 3, 20), numbers(2, 5, 9, seed=1)
    wanted = written_out(layer, states, memory, torch.ones(3, 5, dtype=torch.bool))
    torch.testing.assert_close(layer(states, memory), wanted, atol=1e-5, rtol=1e-4)
    cache = KVLayer(5)
    for step in range(3):
        # The memory is read once: what is given later counts for nothing.
        found = layer(states[:, step : step + 1], memory if step == 0 else torch.zeros_like(memory), cache=cache)
        torch.testing.assert_close(found, wanted[:, step : step + 1], atol=1e-5, rtol=1e-4)
    assert cache.get_seq_length() == 5


@torch.no_grad()
@pytest.mark.parametrize("groups", [4, 2, 1])
def test_it_is_llamas_layer(groups: int) -> None:
    config = LlamaConfig(
        hidden_size=24,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
    )
    config._attn_implementation = "sdpa"
    layer = build(24, 4, groups, 8, rotary=500.0)
    llama = LlamaAttention(config, 0)
    llama.load_state_dict(layer.state_dict())  # the names are the same
    states, positions = numbers(2, 9, 24), torch.arange(9)[None]
    angles = LlamaRotaryEmbedding(config)(states, positions)
    wanted, _ = llama(states, position_embeddings=angles, attention_mask=None)
    torch.testing.assert_close(layer(states), wanted, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer(states, positions=positions), wanted, atol=1e-5, rtol=1e-4)
    # Positions relative to each other count, and nothing else does.
    torch.testing.assert_close(layer(states, positions=positions + 7), wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(layer(states, positions=positions * 2), wanted, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_gives_the_same_token_by_token(window: int | None) -> None:
    layer = build(24, 4, 2, 6, rotary=100.0, rotary_dim=4, window=window)
    states = numbers(2, 11, 24)
    cache = KVLayer(11) if window is None else SlidingKVLayer(window, 11)
    parts = [layer(part, cache=cache) for part in states.split([3, 1, 1, 4, 1, 1], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), layer(states), atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_padding_and_bias() -> None:
    layer = build(24, 4, 2)
    states = numbers(2, 6, 24)
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[0, :2] = False
    padded = layer(states, mask=mask[:, None, None, :])
    torch.testing.assert_close(padded[0, 2:], layer(states[:1, 2:])[0], atol=1e-5, rtol=1e-4)
    bias = torch.zeros(1, 4, 6, 6)
    bias[..., :2] = float("-inf")
    torch.testing.assert_close(layer(states, bias=bias)[0, 2:], padded[0, 2:], atol=1e-5, rtol=1e-4)


def test_it_trains_like_the_layer_of_pytorch() -> None:
    """Multi-head self-attention of ``nn.MultiheadAttention``, output and gradients."""
    layer = build(24, 4, bias=True, is_causal=False)
    other = nn.MultiheadAttention(24, 4, batch_first=True)
    joined = {name: torch.cat([layer.state_dict()[f"{p}_proj.{name}"] for p in "qkv"]) for name in ("weight", "bias")}
    other.load_state_dict(
        {f"in_proj_{name}": value for name, value in joined.items()}
        | {f"out_proj.{name}": layer.state_dict()[f"o_proj.{name}"] for name in ("weight", "bias")}
    )
    states = numbers(3, 5, 24)
    found, (wanted, _) = layer(states), other(states, states, states, need_weights=False)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    found.square().sum().backward()
    wanted.square().sum().backward()
    assert layer.k_proj.weight.grad is not None
    assert other.in_proj_weight.grad is not None
    torch.testing.assert_close(layer.k_proj.weight.grad, other.in_proj_weight.grad[24:48], atol=1e-3, rtol=1e-3)


def test_angles_stay_exact_in_bfloat16() -> None:
    """Far from the start, rotations of a converted layer are those of the float32 layer."""
    layer = build(16, 2, 1, 8, rotary=10000.0)
    query, key = numbers(1, 2, 3, 8), numbers(1, 1, 3, 8, seed=1)
    positions = torch.tensor([4001, 4002, 4003])
    exact, _ = layer._rotated(query, key, positions)
    rounded, _ = layer.to(torch.bfloat16)._rotated(query.bfloat16(), key.bfloat16(), positions)
    assert (rounded.float() - exact).abs().max() < 0.05
    assert torch.float32 == exact.dtype


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((24, 6, 4), {}, "divides 6"),
        ((24, 6, 0), {}, "divides 6"),
        ((24, 6, 2.0), {}, "divides 6"),
        ((24, 6, "2"), {}, "divides 6"),
        ((24, 6, True), {}, "divides 6"),
        ((24, 6.0), {}, "num_heads"),
        ((24, -6, 2), {}, "num_heads"),
        (("24", 6), {}, "hidden_size"),
        ((24, 4, 2), {"head_dim": 0}, "head_dim"),
        ((24, 4, 2), {"rotary": "10"}, "rotary base"),
        ((24, 4, 2), {"rotary": 10.0, "rotary_dim": 4.0}, "rotary_dim"),
        ((25, 6, 3), {}, "head_dim"),
        ((24, 4, 2), {"rotary": 10.0, "rotary_dim": 3}, "even rotary_dim"),
        ((24, 4, 2), {"rotary": 10.0, "rotary_dim": 8}, "at most 6"),
    ],
)
def test_impossible_layers_are_refused(args: Any, kwargs: Any, message: str) -> None:
    with pytest.raises(RegroupError, match=message):
        GroupedQueryAttention(*args, **kwargs)


def test_states_that_do_not_fit_are_refused() -> None:
    layer = regroup.GroupedQueryAttention(24, 4, 2)
    with pytest.raises(RegroupError, match="batch, length, 24"):
        layer(numbers(2, 3, 25))
    nothing: Any = None
    with pytest.raises(RegroupError, match="batch, length, 24"):
        layer(nothing)
    with pytest.raises(RegroupError, match="mask"):
        layer(numbers(2, 3, 24), mask=torch.ones(2, 3, dtype=torch.bool))
