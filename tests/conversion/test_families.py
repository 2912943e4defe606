"""The converter on a tiny checkpoint of every family, against what is exact and against an independent route."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

import naive
import regroup
import tiny
from helpers import (
    KINDS,
    assert_same_tensors,
    config_of,
    convert_heads,
    head_map,
    layout_of,
    logits,
    plan_for,
    tensors,
)
from regroup import RegroupError

FAMILIES = list(tiny.FAMILIES)
ALIBI = ["bloom", "falcon_alibi"]
SHARED_BIAS = ["t5", "t5_v1_1", "mt5"]
REORDERED = [name for name in FAMILIES if name not in ALIBI]

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]


def expected_tensors(parent: PreTrainedModel, stored: dict[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The child's file: what is stored of the parent, with what the other route changed in its state dict."""
    before = parent.state_dict()
    kept = {name: tensor for name, tensor in stored.items() if name in state or name not in before}
    changed = {
        name: tensor
        for name, tensor in state.items()
        if name not in before or tensor.shape != before[name].shape or not torch.equal(tensor, before[name])
    }
    assert changed.keys() <= stored.keys()
    return kept | changed


@pytest.mark.parametrize("name", FAMILIES)
def test_unchanged_heads_give_back_the_checkpoint(name: str, saved: Saved, converted: Converted) -> None:
    parent, child = saved(name), converted(name, "all")
    assert_same_tensors(tensors(child), tensors(parent))
    assert config_of(child) == config_of(parent)
    meaning = [AutoConfig.from_pretrained(folder).to_dict() for folder in (parent, child)]
    assert {key for key, value in meaning[0].items() if meaning[1][key] != value} == {"_name_or_path"}
    assert not list(child.glob("*.py"))


def test_the_comparison_sees_one_bit_a_dtype_and_a_shape() -> None:
    one = {"x": torch.ones(2, 3)}
    flipped = one["x"].clone()
    flipped.view(torch.int32)[1, 2] ^= 1
    others = [flipped, one["x"].double(), one["x"].T.contiguous(), torch.cat([one["x"], one["x"]])]
    for other in others:
        with pytest.raises(AssertionError):
            assert_same_tensors({"x": other}, one)
    with pytest.raises(AssertionError):
        assert_same_tensors({}, one)
    assert_same_tensors({"x": one["x"].clone()}, one)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_streaming_equals_the_state_dict_route(name: str, kind: str, saved: Saved, converted: Converted) -> None:
    # Bit for bit: both routes add float32 in float64 and round once.
    parent, heads = tiny.build(name), head_map(name, kind)
    stored, child = tensors(saved(name)), tensors(converted(name, kind))
    assert_same_tensors(child, expected_tensors(parent, stored, naive.group_state_dict(parent, heads)))
    if kind != "all":
        other = naive.group_state_dict(parent, heads, "first")
        with pytest.raises(AssertionError):
            assert_same_tensors(child, expected_tensors(parent, stored, other))


@pytest.mark.parametrize("name", FAMILIES)
def test_first_equals_the_state_dict_route(name: str, saved: Saved, tmp_path: Path) -> None:
    parent, heads = tiny.build(name), head_map(name, "mixed")
    convert_heads(saved(name), tmp_path / "child", heads, method="first")
    expected = expected_tensors(parent, tensors(saved(name)), naive.group_state_dict(parent, heads, "first"))
    assert_same_tensors(tensors(tmp_path / "child"), expected)


@pytest.mark.parametrize(
    ("name", "groups"), [("llama_grouped", 4), ("phi3_grouped", 4), ("gemma2_grouped", 4), ("mistral_grouped", 3)]
)
def test_groups_across_a_grouped_parents_heads(name: str, groups: int, saved: Saved, tmp_path: Path) -> None:
    """12 query heads on 6 KV heads to 4: a group takes two thirds of one head and a third of the next."""
    parent, heads = tiny.build(name), dict.fromkeys(tiny.FAMILIES[name].attention_modules, groups)
    convert_heads(saved(name), tmp_path / "child", heads)
    expected = expected_tensors(parent, tensors(saved(name)), naive.group_state_dict(parent, heads))
    assert_same_tensors(tensors(tmp_path / "child"), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_child_loads_completely_and_generates(name: str, kind: str, converted: Converted) -> None:
    model, info = load_with_info(converted(name, kind))
    assert {key: value for key, value in info.items() if value} == {}
    given = {key: value for key, value in tiny.inputs(name, 2, 4).items() if key != "decoder_input_ids"}
    tokens = model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert tokens.shape[0] == 2
    family, attention = tiny.FAMILIES[name], dict(model.base_model.named_modules())
    for path, groups in head_map(name, kind).items():
        module = attention[path]
        key = getattr(module, "k_proj", None) or getattr(module, "k", None)
        if key is not None:
            assert key.weight.shape[0] == groups * family.head_dim


def load_with_info(folder: Path) -> tuple[Any, dict[str, Any]]:
    loaded: Any = regroup.load(folder, output_loading_info=True)
    return loaded


@pytest.mark.parametrize("kind", ["some", "one", "mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_equal_heads_in_each_group_lose_nothing(name: str, kind: str, converted: Converted, tmp_path: Path) -> None:
    heads, parent = head_map(name, kind), tiny.build(name)
    untied = logits(parent, name)
    assert (logits(regroup.load(converted(name, kind)), name) - untied).abs().max() > 1e-3
    naive.tie_groups(parent, heads)
    parent.save_pretrained(tmp_path / "parent")
    convert_heads(tmp_path / "parent", tmp_path / "child", heads)
    child = regroup.load(tmp_path / "child")
    torch.testing.assert_close(logits(child, name), logits(parent, name), atol=1e-5, rtol=1e-5)


def group_order(heads: int, kv_heads: int, seed: int) -> list[int]:
    """An order of query heads that keeps the parent's groups whole."""
    draw, n = random.Random(seed), heads // kv_heads
    groups = [draw.sample(range(g * n, (g + 1) * n), n) for g in range(kv_heads)]
    draw.shuffle(groups)
    order = [head for group in groups for head in group]
    return order if order != list(range(heads)) else order[::-1]


@pytest.mark.parametrize("name", REORDERED)
def test_reordered_query_heads_change_nothing(name: str, saved: Saved, tmp_path: Path) -> None:
    family, parent = tiny.FAMILIES[name], tiny.build(name)
    H, G = family.num_attention_heads, family.num_key_value_heads
    # Every layer has an order of its own, but for those that share one position bias.
    layers = layout_of(saved(name)).layers
    orders = {x.module: group_order(H, G, 0 if x.order_group else 1 + i) for i, x in enumerate(layers)}
    convert_heads(saved(name), tmp_path / "child", head_map(name, "all"), orders=orders)
    child = regroup.load(tmp_path / "child")
    expected = logits(parent, name)
    torch.testing.assert_close(logits(child, name), expected, atol=1e-5, rtol=1e-5)

    state = dict(parent.state_dict())
    for path, attention in naive.attentions(parent).items():
        for suffix in ("weight", "bias"):
            query, key, value = attention.read(state, suffix)
            attention.write(state, suffix, None if query is None else query[orders[path]], key, value)
    parent.load_state_dict(state)
    assert (logits(parent, name) - expected).abs().max() > 1e-3  # queries alone: the oracle can fail


@pytest.mark.parametrize("kind", ["all", "some", "one"])
@pytest.mark.parametrize("name", REORDERED)
def test_reordering_and_grouping_equals_the_state_dict_route(
    name: str, kind: str, saved: Saved, tmp_path: Path
) -> None:
    family, parent = tiny.FAMILIES[name], tiny.build(name)
    order = group_order(family.num_attention_heads, family.num_key_value_heads, 0)
    heads = head_map(name, kind)
    convert_heads(saved(name), tmp_path / "child", heads, orders=dict.fromkeys(heads, order))
    stored = tensors(saved(name))
    permuted = tiny.build(name)
    naive.permute_query_heads(permuted, order)
    state = naive.group_state_dict(permuted, heads)
    assert_same_tensors(tensors(tmp_path / "child"), expected_tensors(parent, stored, state))


@pytest.mark.parametrize("name", ALIBI)
def test_alibi_heads_keep_their_order(name: str, saved: Saved) -> None:
    family, layout = tiny.FAMILIES[name], layout_of(saved(name))
    order = group_order(family.num_attention_heads, family.num_key_value_heads, 0)
    heads = head_map(name, "all")
    with pytest.raises(RegroupError, match="ALiBi"):
        plan_for(layout, heads, orders=dict.fromkeys(heads, order)).check(layout)
    identity = list(range(family.num_attention_heads))
    plan_for(layout, heads, orders=dict.fromkeys(heads, identity)).check(layout)


@pytest.mark.parametrize("name", SHARED_BIAS)
def test_layers_that_share_a_position_bias_share_an_order(name: str, saved: Saved) -> None:
    layout, heads = layout_of(saved(name)), head_map(name, "all")
    orders = {path: group_order(6, 6, 0) for path in heads}
    plan_for(layout, heads, orders=orders).check(layout)
    cross = "decoder.block.1.layer.1.EncDecAttention"
    plan_for(layout, heads, orders=orders | {cross: group_order(6, 6, 1)}).check(layout)
    own = "decoder.block.1.layer.0.SelfAttention"
    with pytest.raises(RegroupError, match="share one order") as refusal:
        plan_for(layout, heads, orders=orders | {own: group_order(6, 6, 1)}).check(layout)
    assert refusal.value.details["layer"] == own


def test_a_bias_of_each_layer_leaves_orders_free(saved: Saved) -> None:
    layout, heads = layout_of(saved("umt5")), head_map("umt5", "all")
    plan_for(layout, heads, orders={path: group_order(6, 6, i) for i, path in enumerate(heads)}).check(layout)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_checkpoint_can_be_grouped_further(name: str, converted: Converted, tmp_path: Path) -> None:
    """One KV head by way of another number is what the other route makes of the same two steps."""
    some, step = converted(name, "mixed"), tmp_path / "step"
    assert {x.module: x.num_key_value_heads for x in layout_of(some).layers} == head_map(name, "mixed")
    convert_heads(some, step, head_map(name, "one"))
    assert {x.num_key_value_heads for x in layout_of(step).layers} == {1}
    model, info = load_with_info(step)
    assert {key: value for key, value in info.items() if value} == {}
    assert logits(model, name).isfinite().all()
    again = tmp_path / "again"
    convert_heads(step, again, head_map(name, "one"))
    assert_same_tensors(tensors(again), tensors(step))
