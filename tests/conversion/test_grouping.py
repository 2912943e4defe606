"""Heads that belong together: hidden pairs found again, costs by brute force, and orders that have to stay."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import regroup
import tiny
from helpers import assert_same_tensors, carried_out, config_of, everything, layout_of, refused, run, tensors
from helpers import on_text as as_asked
from regroup.calibration.settings import Settings
from regroup.checkpoint import open_checkpoint
from regroup.layout import AttentionLayer
from regroup.merge.lowrank import low_rank
from regroup.merge.rotary import rotary_low_rank
from regroup.merge.sharing import error
from regroup.plans import Plan, make_plan
from regroup.solver import grouping
from regroup.solver.heads import HeadWeights
from regroup.solver.residuals import LayerResiduals
from regroup.solver.statistics import ungrouped_statistics

Saved = Callable[[str], Path]
Image = Callable[[AttentionLayer, str, torch.Generator], Tensor]
Clusters = Sequence[Sequence[int]]
PAIRS = ((0, 4), (1, 3), (2, 5))
OTHER_PAIRS = ((0, 3), (1, 5), (2, 4))
TRIPLES: Clusters = ((0, 4, 8), (1, 3, 5), (2, 6, 7))  # of nine heads


def free(layer: AttentionLayer, part: str, chance: torch.Generator) -> Tensor:
    """Any invertible map; for keys under RoPE a complex number for every pair of dimensions."""
    return image(layer, part, chance, rigid=False)


def rigid(layer: AttentionLayer, part: str, chance: torch.Generator) -> Tensor:
    """The same, but nothing is stretched."""
    return image(layer, part, chance, rigid=True)


def equal(layer: AttentionLayer, part: str, chance: torch.Generator) -> Tensor:
    return torch.eye(layer.head_dim)


def image(layer: AttentionLayer, part: str, chance: torch.Generator, *, rigid: bool) -> Tensor:
    D = layer.head_dim
    dim = layer.rotary.dim if part == "key" and layer.rotary is not None else 0
    out = torch.zeros(D, D)
    for f in range(dim // 2):
        assert layer.rotary is not None
        i, j = (f, f + dim // 2) if layer.rotary.pairs == "half" else (2 * f, 2 * f + 1)
        angle = float(6.3 * torch.rand(1, generator=chance))
        turn = torch.polar(torch.tensor(1.0 if rigid else 0.5 + f), torch.tensor(angle))
        out[i, i] = out[j, j] = turn.real
        out[i, j], out[j, i] = -turn.imag, turn.imag
    rest = torch.randn(D - dim, D - dim, generator=chance)
    out[dim:, dim:] = torch.linalg.qr(rest)[0] if rigid else torch.eye(D - dim) + 0.5 * rest
    return out


def hide(folder: Path, clusters: Clusters, made: Image = free, *, cross: Clusters | None = None) -> Path:
    """Replace the KV heads of each cluster by images of its first one, wherever the heads lie in their tensors."""
    chance = torch.Generator().manual_seed(11)
    path = folder / "model.safetensors"
    state = load_file(path)
    for layer in layout_of(folder).layers:
        D = layer.head_dim
        wanted = cross if layer.kind == "cross" and cross is not None else clusters
        for part, projection in (("key", layer.key), ("value", layer.value)):
            for first, *others in wanted:
                for head in others:
                    turn = made(layer, part, chance)
                    for slot in (projection.weight, projection.bias):
                        if slot is None:
                            continue
                        tensor = state[slot.tensor].movedim(slot.axis, 0)
                        source = tensor[slot.start(first) : slot.start(first) + D]
                        tensor[slot.start(head) : slot.start(head) + D] = torch.tensordot(turn, source, 1)
    save_file(state, path, metadata={"format": "pt"})
    return folder


def llama(folder: Path, heads: int, kv_heads: int, *, layers: int = 1, D: int = 4) -> Path:
    """A Llama with a number of heads that no tiny family has."""
    config = LlamaConfig(
        vocab_size=tiny.VOCAB_SIZE,
        hidden_size=48,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=D,
        max_position_embeddings=64,
    )
    model: Any = LlamaForCausalLM(config)
    tiny.randomize(model, std=0.2, seed=5)
    model.save_pretrained(folder)
    return folder


def searched(folder: Path, kv_heads: int | None, *, seed: int = 0, **options: Any) -> Plan:
    layout = layout_of(folder)
    plan = make_plan(layout, kv_heads, method=options.pop("method", "auto"), seed=seed, **options)
    return grouping.group_by_weights(open_checkpoint(folder), layout, plan)


def sets(order: Sequence[int] | None, groups: int) -> set[frozenset[int]] | None:
    """The groups that an order of query heads makes."""
    if order is None:
        return None
    n = len(order) // groups
    return {frozenset(order[g * n : (g + 1) * n]) for g in range(groups)}


def as_sets(clusters: Clusters) -> set[frozenset[int]]:
    return {frozenset(members) for members in clusters}


INPUTS: dict[str, Any] = {"input_ids": torch.randint(3, tiny.VOCAB_SIZE, (2, 9), generator=torch.Generator())}


@torch.no_grad()
def logits(folder: Path, inputs: dict[str, Any]) -> Tensor:
    model: Any = regroup.load(folder, dtype=torch.float32, attn_implementation="eager", progress=False)
    return model.eval()(**inputs, use_cache=False).logits


def assert_lossless(child: Path, parent: Path, inputs: dict[str, Any]) -> None:
    torch.testing.assert_close(logits(child, inputs), logits(parent, inputs), rtol=1e-4, atol=1e-4)


def assert_lossy(child: Path, parent: Path, inputs: dict[str, Any]) -> None:
    assert (logits(child, inputs) - logits(parent, inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama", "phi", "gpt_neox", "cohere", "gpt2", "opt", "phi3"])
@pytest.mark.parametrize(("method", "made"), [("lowrank", free), ("auto", rigid)])
def test_hidden_pairs_are_found_and_cost_nothing(name: str, method: str, made: Image, tmp_path: Path) -> None:
    """Pairs that neighbours know nothing of: with the search nothing is lost, with neighbouring groups much is."""
    clusters = TRIPLES if name == "gpt_neox" else PAIRS
    parent = hide(tiny.save(name, tmp_path / "parent"), clusters, made)
    plan = searched(parent, 3, method=method)
    assert [sets(layer.query_order, 3) for layer in plan.layers] == [as_sets(clusters)] * len(plan.layers)
    inputs = tiny.inputs(name, 2, 9, seed=99)
    options: Any = {"kv_heads": 3, "method": method, "calibration": "none" if method == "auto" else None}
    regroup.convert(parent, tmp_path / "child", grouping="search", **options)
    assert_lossless(tmp_path / "child", parent, inputs)
    regroup.convert(parent, tmp_path / "control", grouping="contiguous", **options)
    assert_lossy(tmp_path / "control", parent, inputs)


@pytest.mark.parametrize(
    ("heads", "clusters"),
    [
        (8, ((0, 5), (1, 3), (2, 7), (4, 6))),  # 105 partitions: all of them are tried
        (12, ((0, 7), (1, 10), (2, 5), (3, 11), (4, 8), (6, 9))),  # 10395: a search by swaps
        (12, ((0, 7, 9), (1, 5, 10), (2, 4, 11), (3, 6, 8))),
    ],
)
def test_pairs_among_many_heads(heads: int, clusters: Clusters, tmp_path: Path) -> None:
    parent = hide(llama(tmp_path / "parent", heads, heads), clusters)
    groups = len(clusters)
    plan = searched(parent, groups)
    assert sets(plan.layers[0].query_order, groups) == as_sets(clusters)
    regroup.convert(parent, tmp_path / "child", kv_heads=groups, method="lowrank", grouping="search")
    assert_lossless(tmp_path / "child", parent, INPUTS)
    regroup.convert(parent, tmp_path / "control", kv_heads=groups, method="lowrank")
    assert_lossy(tmp_path / "control", parent, INPUTS)


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_cross_attention_has_an_order_of_its_own(name: str, tmp_path: Path) -> None:
    """T5's self-attention layers share a position bias and so an order; BART's do not, nor does cross-attention."""
    parent = hide(tiny.save(name, tmp_path / "parent"), PAIRS, cross=OTHER_PAIRS)
    plan = searched(parent, 3, method="lowrank")
    for want, layer in zip(plan.layers, layout_of(parent).layers, strict=True):
        assert sets(want.query_order, 3) == as_sets(OTHER_PAIRS if layer.kind == "cross" else PAIRS)
    inputs = tiny.inputs(name, 2, 9, seed=99)
    regroup.convert(parent, tmp_path / "child", kv_heads=3, method="lowrank", grouping="search")
    assert_lossless(tmp_path / "child", parent, inputs)
    regroup.convert(parent, tmp_path / "control", kv_heads=3, method="lowrank")
    assert_lossy(tmp_path / "control", parent, inputs)


def test_layers_that_share_an_order_are_searched_together(saved: Saved, tmp_path: Path) -> None:
    """The order that all T5 self-attention layers get is the best for their sum, not that of any one of them."""
    folder = saved("t5")
    layout = layout_of(folder)
    own = [layer for layer in layout.layers if layer.kind == "self"]
    alone = {layer.name: residuals(folder, layer, 3) for layer in own}
    best = min(PARTITIONS, key=lambda ways: sum(cost(members) for cost in alone.values() for members in ways))
    plan = searched(folder, 3)
    orders = {want.query_order for want, layer in zip(plan.layers, layout.layers, strict=True) if layer.kind == "self"}
    assert [sets(order, 3) for order in orders] == [as_sets(best)]
    # Each alone would have chosen another.
    single = [min(PARTITIONS, key=lambda ways, cost=cost: sum(map(cost, ways))) for cost in alone.values()]
    assert any(as_sets(ways) != as_sets(best) for ways in single)
    plan.check(layout)
    # A layer that stays, or has another G, keeps the rest of them from moving; cross-attention is free.
    for layers in ("self.0:3,cross.0-1:3", "self.0:3,self.1:2,cross.0-1:3"):
        some = searched(folder, None, layers=layers)
        for want, layer in zip(some.layers, layout.layers, strict=True):
            assert (want.query_order is None) == (layer.kind == "self")
        some.check(layout)


def test_a_shared_order_comes_from_the_weights_and_others_from_the_text(saved: Saved) -> None:
    folder = saved("t5")
    layout = layout_of(folder)
    plan = as_asked(make_plan(layout, 3, method="auto"))
    found = grouping.group_by_weights(open_checkpoint(folder), layout, plan)
    for want, whole, layer in zip(found.layers, searched(folder, 3).layers, layout.layers, strict=True):
        assert want.query_order == (whole.query_order if layer.kind == "self" else None)
    assert found.layers[0].query_order is not None


@pytest.mark.parametrize("name", ["bloom", "falcon_alibi"])
def test_slopes_by_head_number_keep_the_order(name: str, tmp_path: Path) -> None:
    """ALiBi gives each query head a slope by its number: hidden groups have to stay hidden, on weights and on text."""
    groups = 3
    clusters = TRIPLES if name == "bloom" else PAIRS
    parent = hide(tiny.save(name, tmp_path / "parent"), clusters)
    assert [layer.query_order for layer in searched(parent, groups).layers] == [None] * 2
    regroup.convert(parent, tmp_path / "a", kv_heads=groups, method="lowrank", grouping="search")
    regroup.convert(parent, tmp_path / "b", kv_heads=groups, method="lowrank", grouping="contiguous")
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert on_text(parent, name, groups, tmp_path, search=True)[0] == [None] * 2
    # Without slopes the same heads do find each other.
    if name == "falcon_alibi":
        parent = hide(tiny.save("falcon", tmp_path / "free"), PAIRS)
        assert [sets(layer.query_order, 3) for layer in searched(parent, 3).layers] == [as_sets(PAIRS)] * 2


def on_text(
    parent: Path, name: str, groups: int, tmp_path: Path, *, search: bool, layers: str | None = None
) -> tuple[list[tuple[int, ...] | None], Path]:
    """Orders of the layers that calibration changed, and the child."""
    batches = [tiny.inputs(name, 2, 12, seed=seed) for seed in range(4)]
    plan = make_plan(layout_of(parent), None if layers else groups, layers=layers, method="lowrank")
    child = tmp_path / f"child-{search}"
    # No search by weights before it, which layers that share an order would have.
    asked = as_asked(plan, choose=False, search=False)
    done = carried_out(parent, asked, child, batches, settings=Settings(search=search, repair="none"), device="cpu")
    return [layer.query_order for layer in done.result.plan.layers if layer.changes], child


@pytest.mark.parametrize(
    ("name", "layers"), [("llama", None), ("opt", None), ("t5", "cross.0-1:3"), ("t5", "self.0:3")]
)
def test_hidden_pairs_are_found_on_text(name: str, layers: str | None, tmp_path: Path) -> None:
    """Likewise on text, except where layers share an order, which one layer at a time cannot find."""
    cross = layers is not None and "cross" in layers
    parent = hide(tiny.save(name, tmp_path / "parent"), PAIRS, cross=OTHER_PAIRS)
    inputs = tiny.inputs(name, 2, 9, seed=99)
    orders, child = on_text(parent, name, 3, tmp_path, search=True, layers=layers)
    if layers == "self.0:3":
        assert orders == [None]
        return
    assert [sets(order, 3) for order in orders] == [as_sets(OTHER_PAIRS if cross else PAIRS)] * len(orders)
    torch.testing.assert_close(logits(child, inputs), logits(parent, inputs), rtol=1e-3, atol=1e-3)
    orders, child = on_text(parent, name, 3, tmp_path, search=False, layers=layers)
    assert set(orders) == {None}
    assert_lossy(child, parent, inputs)


def naive_parts(folder: Path, layer: AttentionLayer, groups: int) -> tuple[int, list[tuple[Tensor, Tensor, bool]]]:
    """Units, and Γ (units, D, D), K (units·D, units·D) and whether it rotates, from tensors taken apart by hand."""
    state = {name: tensor.double() for name, tensor in tensors(folder).items()}
    H, G, D = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim

    def rows(projection: Any) -> Tensor:
        assert (projection.weight.axis, projection.weight.per_block, projection.weight.offset) == (0, 0, 0)
        weight = state[projection.weight.tensor]
        return weight if projection.bias is None else torch.cat([weight, state[projection.bias.tensor][:, None]], 1)

    # Units are KV heads where groups hold whole ones; else query heads, each with a copy of its KV head.
    units = G if G % groups == 0 else H
    queries = [[h for h in range(H) if h * units // H == unit] for unit in range(units)]
    parts = []
    for part in ("key", "value"):
        stack = rows(getattr(layer, part))
        stack = torch.cat([stack[unit * G // units * D :][:D] for unit in range(units)])
        grams = torch.zeros(units, D, D, dtype=torch.float64)
        for unit, heads in enumerate(queries):
            for h in heads:
                if part == "key":
                    q = rows(layer.query)[h * D : (h + 1) * D]
                    grams[unit] += q @ q.T
                else:
                    o = state[layer.output.weight.tensor][:, h * D : (h + 1) * D]
                    grams[unit] += o.T @ o
        parts.append((grams, stack @ stack.T, part == "key" and layer.rotary is not None))
    return units, parts


def naive_cost(folder: Path, layer: AttentionLayer, groups: int) -> Callable[[tuple[int, ...]], float]:
    """What a group loses: the error of the best sharing that the rules find, as a share of the layer's energy."""
    units, parts = naive_parts(folder, layer, groups)
    D = layer.head_dim

    def measured_by(grams: Tensor, rotates: bool) -> Tensor:
        """Under RoPE all that counts of a query is the mean power of each pair."""
        if not rotates:
            return grams
        assert layer.rotary is not None
        dim, out = layer.rotary.dim, grams.clone()
        out[:, :dim, :], out[:, :, :dim] = 0, 0
        for f in range(dim // 2):
            i, j = (f, f + dim // 2) if layer.rotary.pairs == "half" else (2 * f, 2 * f + 1)
            out[:, i, i] = out[:, j, j] = (grams[:, i, i] + grams[:, j, j]) / 2
        return out

    def cost(members: tuple[int, ...]) -> float:
        total = 0.0
        for grams, K, rotates in parts:
            metric = measured_by(grams, rotates)
            blocks = K.view(units, D, units, D)
            energy = sum(float(torch.trace(metric[u] @ blocks[u, :, u])) for u in range(units))
            index = [u * D + d for u in members for d in range(D)]
            own, place = K[index][:, index], list(range(len(members)))
            if rotates:
                assert layer.rotary is not None
                best = rotary_low_rank(grams[list(members)], own, place, pairs=layer.rotary.pairs, dim=layer.rotary.dim)
            else:
                best = low_rank(grams[list(members)], own, place)
            total += error(best, metric[list(members)], own, place) / energy
        return total

    return cost


def residuals(folder: Path, layer: AttentionLayer, groups: int) -> Callable[[tuple[int, ...]], float]:
    return ours(folder, layer, groups).cost


def ours(folder: Path, layer: AttentionLayer, groups: int) -> LayerResiduals:
    weights = HeadWeights.read(layer, open_checkpoint(folder).read)
    return LayerResiduals(layer, ungrouped_statistics(weights), groups)


def ways(units: tuple[int, ...], size: int) -> list[list[tuple[int, ...]]]:
    """Every partition into sets of a size."""
    if not units:
        return [[]]
    found = []
    for others in combinations(units[1:], size - 1):
        rest = tuple(u for u in units[1:] if u not in others)
        found += [[(units[0], *others), *tail] for tail in ways(rest, size)]
    return found


PARTITIONS = ways(tuple(range(6)), 2)


@pytest.mark.parametrize(
    ("name", "groups"), [("llama", 3), ("phi", 2), ("opt", 3), ("llama_grouped", 3), ("llama_grouped", 4), ("t5", 2)]
)
def test_costs_by_brute_force(name: str, groups: int, saved: Saved) -> None:
    """Costs are errors of the low-rank sharing over the energy of the layer; the table holds those of pairs."""
    folder = saved(name)
    for layer in layout_of(folder).layers[:2]:
        found, naive = ours(folder, layer, groups), naive_cost(folder, layer, groups)
        assert found.units == (12 if groups == 4 else 6)
        size = found.units // groups
        for members in [(0, 3), tuple(range(size)), tuple(range(0, 2 * size, 2)), (1, 2, 4), (5,)]:
            assert found.cost(members) == pytest.approx(naive(members), rel=1e-6, abs=1e-12)
        assert found.cost((5,)) == pytest.approx(0, abs=1e-12)
        assert found.cost((0, 3)) > 1e-3
        table = found.pair_costs()
        for a, b in ((0, 3), (1, 4), (2, 5), (4, 1)):
            assert float(table[a, b]) == pytest.approx(naive((min(a, b), max(a, b))), rel=1e-6)
        assert naive((0, 3)) != pytest.approx(naive((0, 4)), rel=1e-3)
        if groups == 4:
            # Copies of one KV head have nothing to lose.
            assert found.cost((2, 3)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "groups"), [("llama", 3), ("llama", 2), ("opt", 2), ("phi", 3), ("llama_grouped", 3), ("llama_grouped", 4)]
)
def test_never_more_residual_than_neighbours(name: str, groups: int, saved: Saved) -> None:
    """The plan loses least of all partitions where they can be counted, and never more than contiguous groups."""
    folder = saved(name)
    plan = searched(folder, groups)
    better = 0
    for want, layer in zip(plan.layers, layout_of(folder).layers, strict=True):
        cost = naive_cost(folder, layer, groups)
        units = layer.num_key_value_heads if layer.num_key_value_heads % groups == 0 else layer.num_attention_heads
        queries = layer.num_attention_heads // units

        def total(order: Sequence[int], cost: Any = cost, queries: int = queries) -> float:
            n = len(order) // groups
            runs = [order[g * n : (g + 1) * n] for g in range(groups)]
            return sum(cost(tuple(sorted({head // queries for head in run}))) for run in runs)

        assert sorted(want.order) == list(range(layer.num_attention_heads))
        found, neighbours = total(want.order), total(range(layer.num_attention_heads))
        assert found <= neighbours * (1 + 1e-9)
        better += found < 0.99 * neighbours
        if units == 6:
            least = min(sum(map(cost, partition)) for partition in ways(tuple(range(6)), 6 // groups))
            assert found == pytest.approx(least, rel=1e-9)
    assert better


def test_groups_that_split_kv_heads(tmp_path: Path) -> None:
    """12 query heads on 6 KV heads to 4: groups hold one and a half KV heads each. Two families of heads are hidden."""
    parent = hide(llama(tmp_path / "parent", 12, 6, layers=2), ((0, 2, 5), (1, 3, 4)))
    plan = searched(parent, 4, method="lowrank")
    for layer in plan.layers:
        assert layer.query_order is not None
        groups = sets(layer.query_order, 4)
        assert groups is not None
        for members in groups:
            assert {head // 2 for head in members} <= {0, 2, 5} or {head // 2 for head in members} <= {1, 3, 4}
    regroup.convert(parent, tmp_path / "child", kv_heads=4, method="lowrank", grouping="search")
    assert [layer.num_key_value_heads for layer in layout_of(tmp_path / "child").layers] == [4, 4]
    assert_lossless(tmp_path / "child", parent, INPUTS)
    regroup.convert(parent, tmp_path / "control", kv_heads=4, method="lowrank")
    assert_lossy(tmp_path / "control", parent, INPUTS)


def test_the_same_plan_again(tmp_path: Path) -> None:
    """12 heads are searched from random starts, which come from the seed alone."""
    parent = llama(tmp_path / "parent", 12, 12)
    plans = [searched(parent, 4, seed=3) for _ in range(2)]
    torch.manual_seed(1)
    plans.append(searched(parent, 4, seed=3))
    assert plans[0] == plans[1] == plans[2]
    assert plans[0].layers[0].query_order is not None


def test_what_is_not_searched(saved: Saved) -> None:
    """An order that the plan names, a layer that stays, and one group stay as they are."""
    folder = saved("llama")
    layout = layout_of(folder)
    plan = make_plan(layout, 3, layers="1:6,2:1", method="auto")
    order = (5, 4, 3, 2, 1, 0)
    named = replace(plan, layers=(replace(plan.layers[0], query_order=order), *plan.layers[1:]))
    assert grouping.group_by_weights(open_checkpoint(folder), layout, named) == named
    # Without the name that layer is searched, and only that one.
    found = grouping.group_by_weights(open_checkpoint(folder), layout, plan)
    assert found.layers[0].query_order not in (None, order)
    assert found.layers[1:] == plan.layers[1:]


def test_nothing_to_go_by(saved: Saved) -> None:
    """OLMo clips keys and values, Qwen 3 has a norm after its keys: without text to judge by, neighbours stay."""
    for name in ("olmo", "qwen3"):
        assert {layer.query_order for layer in searched(saved(name), 3).layers} == {None}
    assert any(layer.query_order is not None for layer in searched(saved("llama"), 3).layers)


def test_pooling_by_mean_of_heads_that_belong_together(tmp_path: Path) -> None:
    """The paper's mean has nothing to lose where the heads of a group are equal, and any method may be searched for."""
    parent = hide(tiny.save("llama", tmp_path / "parent"), PAIRS, equal)
    inputs = tiny.inputs("llama", 2, 9, seed=99)
    regroup.convert(parent, tmp_path / "child", kv_heads=3, method="mean", grouping="search")
    assert_lossless(tmp_path / "child", parent, inputs)
    # Neighbours are the default of every method but auto.
    regroup.convert(parent, tmp_path / "control", kv_heads=3, method="mean")
    assert_lossy(tmp_path / "control", parent, inputs)
    regroup.convert(parent, tmp_path / "auto", kv_heads=3, calibration="none")
    torch.testing.assert_close(logits(tmp_path / "auto", inputs), logits(parent, inputs), rtol=1e-4, atol=1e-4)
    assert config_of(tmp_path / "child") == config_of(tmp_path / "control")


def test_the_command_writes_the_order_into_the_plan(tmp_path: Path) -> None:
    parent = hide(tiny.save("opt", tmp_path / "parent"), PAIRS)
    path = tmp_path / "plan.json"
    options = ("--kv-heads", 3, "--method", "lowrank")
    status, _, err = run("plan", parent, *options, "--grouping", "search", "-o", path)
    assert status == 0, err
    layers = json.loads(path.read_text())["layers"]
    assert [sets(layer["query_order"], 3) for layer in layers] == [as_sets(PAIRS)] * 2
    status, _, err = run("convert", parent, tmp_path / "a", "--plan", path)
    assert status == 0, err
    status, _, err = run("convert", parent, tmp_path / "b", *options, "--grouping", "search")
    assert status == 0, err
    assert_same_tensors(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    for words in ((), ("--grouping", "contiguous")):
        status, out, _ = run("plan", parent, *options, *words)
        assert status == 0
        assert {layer.get("query_order") for layer in json.loads(out)["layers"]} == {None}


def test_groupings_that_cannot_be(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama")
    (tmp_path / "plan.json").write_text(make_plan(layout_of(folder), 2).dumps())
    before = everything(tmp_path)
    for verb in (("plan", folder), ("convert", folder, tmp_path / "child")):
        message = refused(*verb, "--kv-heads", 2, "--grouping", "random")
        assert [
            word for word in ("grouping is not known", "contiguous or search", "random") if word not in message
        ] == []
    assert "not known" in refused("plan", folder, "--kv-budget", "50%", "--grouping", "best")
    for way in ("contiguous", "search"):
        options = ("--plan", tmp_path / "plan.json", "--grouping", way)
        message = refused("convert", folder, tmp_path / "child", *options)
        assert "a plan and a grouping were both given" in message
        assert "query_order" in message
    assert everything(tmp_path) == before


def test_every_layer_is_reported_once(saved: Saved) -> None:
    """Layers that are searched alone or together, and those that are passed over."""
    for name in ("bart", "t5", "bloom"):
        folder = saved(name)
        layout, checkpoint = layout_of(folder), open_checkpoint(folder)
        for plan in (make_plan(layout, 3, method="auto"), make_plan(layout, layers="0:1", method="auto")):
            for asked in (plan, as_asked(plan)):
                told: list[int] = []
                grouping.group_by_weights(checkpoint, layout, asked, progress=told.append)
                assert sum(told) == len(layout.layers)


@pytest.mark.parametrize("part", ["q_proj", "k_proj", "v_proj", "o_proj"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(part: str, value: float, tmp_path: Path) -> None:
    """They are named, whether heads are searched for or not; the paper's mean copies what it finds."""
    parent = tiny.save("llama", tmp_path / "parent")
    state = tensors(parent)
    state[f"model.layers.1.self_attn.{part}.weight"][0, 0] = value
    save_file(state, parent / "model.safetensors", metadata={"format": "pt"})
    for way in ("search", "contiguous"):
        message = refused(
            "convert", parent, tmp_path / "child", "--kv-heads", 2, "--grouping", way, "--calibration", "none"
        )
        assert "a weight is not a finite number" in message
        assert f"model.layers.1.self_attn.{part}.weight" in message
    assert run("convert", parent, tmp_path / "child", "--kv-heads", 2, "--method", "mean")[0] == 0
