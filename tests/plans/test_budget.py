"""Budgets: the knapsack against enumeration, what a layer may choose against the plan's checks, text to bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import layout_of
from regroup import RegroupError
from regroup.layout import Layout
from regroup.layout.kv_cache import DTYPE_BYTES, kv_cache_bytes
from regroup.plans import LayerPlan, Plan, allocate, allowed_kv_heads, layer_units, parse_budget, token_bytes

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def llama(saved: Saved) -> Layout:
    return layout_of(saved("llama"))  # 3 layers, 6 heads


@pytest.fixture(scope="module")
def layouts(saved: Saved) -> list[Layout]:
    return [layout_of(saved(name)) for name in ("llama", "llama_grouped", "bart", "mistral")]


def accepted(layout: Layout, index: int, heads: int, degree: int) -> bool:
    """Whether the plan's own check takes it."""
    layer = layout.layers[index]
    single = replace(layout, layers=(layer,))
    want = LayerPlan(layer.name, layer.num_attention_heads, layer.num_key_value_heads, heads)
    try:
        Plan(layout.family, single.fingerprint(), (want,), degree).check(single)
    except RegroupError:
        return False
    return True


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 12])
def test_allowed_is_what_the_plan_accepts(degree: int, layouts: list[Layout]) -> None:
    for layout in layouts:
        for index, layer in enumerate(layout.layers):
            taken = [g for g in range(-1, 15) if accepted(layout, index, g, degree)]
            if layer.num_attention_heads % degree:
                assert taken == []
                with pytest.raises(RegroupError, match=r"divided over that many devices[\s\S]*remedy"):
                    allowed_kv_heads(layer, degree)
            else:
                assert allowed_kv_heads(layer, degree) == taken


def test_allowed_by_hand(llama: Layout) -> None:
    layer = replace(llama.layers[0], num_attention_heads=12, num_key_value_heads=6)
    assert allowed_kv_heads(layer) == [1, 2, 3, 4, 6]
    assert allowed_kv_heads(layer, 4) == [1, 2, 4]  # not 6, the parent's own number
    assert allowed_kv_heads(layer, 3) == [1, 3, 6]
    for degree in (0, -1, 5):
        with pytest.raises(RegroupError, match="devices"):
            allowed_kv_heads(layer, degree)


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F8"])
def test_units_are_those_of_the_roofline(dtype: str, layouts: list[Layout]) -> None:
    for layout in layouts:
        for layer in layout.layers:
            units = layer_units(layer, DTYPE_BYTES[dtype])
            assert units == {g: kv_cache_bytes([layer.with_kv_heads(g)], dtype=dtype) for g in units}
            assert list(units) == allowed_kv_heads(layer)
    layer = replace(layouts[0].layers[0], head_dim=80)
    assert layer_units(layer, 2, 2) == {1: 320, 2: 640, 6: 1920}
    assert token_bytes(layer, 6) == 1920


def enumerate_best(costs: list[dict[int, float]], units: list[dict[int, int]], budget: int) -> tuple[float, int] | None:
    """Lowest cost, then fewest units, over every combination."""
    ways = product(*costs)
    found = [
        (sum((c[g] for c, g in zip(costs, way, strict=True)), 0.0), sum(u[g] for u, g in zip(units, way, strict=True)))
        for way in ways
    ]
    return min((pair for pair in found if pair[1] <= budget), default=None)


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_allocation_by_enumeration(data: st.DataObject) -> None:
    layers = data.draw(st.integers(1, 5))
    costs: list[dict[int, float]] = []
    units: list[dict[int, int]] = []
    value = st.one_of(st.integers(0, 3).map(float), st.floats(-1, 10))
    for _ in range(layers):
        choices = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4, unique=True))
        size = data.draw(st.integers(1, 9))  # head_dims that share no divisor
        costs.append({g: data.draw(value) for g in choices})
        units.append({g: g * size for g in (*choices, 24)})  # more than is asked for
    budget = data.draw(st.integers(0, 12 * 9 * layers))
    best = enumerate_best(costs, units, budget)
    if best is None:
        with pytest.raises(RegroupError, match=r"smaller than[\s\S]*remedy: +pass at least [\d.]+%"):
            allocate(costs, units, budget)
        return
    chosen = allocate(costs, units, budget)
    # The same additions in the same order, so that the same number comes out.
    assert sum((c[g] for c, g in zip(costs, chosen, strict=True)), 0.0) == best[0]
    assert sum(u[g] for u, g in zip(units, chosen, strict=True)) == best[1]


def test_the_layer_that_suffers_keeps_its_heads() -> None:
    costs = [{1: 1.0, 2: 0.5, 4: 0.0}, {1: 0.1, 2: 0.05, 4: 0.0}]
    units = [{g: g * 256 for g in (1, 2, 4)}] * 2
    assert allocate(costs, units, 5 * 256) == [4, 1]
    assert allocate(costs[::-1], units, 5 * 256) == [1, 4]
    # A greedy choice by cost a byte would stop at another place: here the middle is worth nothing.
    steep = [{1: 1.0, 2: 1.0, 4: 0.0}, {1: 0.6, 2: 0.0, 4: 0.0}]
    assert allocate(steep, units, 5 * 256) == [4, 1]
    assert allocate(steep, units, 4 * 256) == [1, 2]


def test_the_boundary_is_exact() -> None:
    costs = [{1: 1.0, 4: 0.0}] * 3
    units = [{1: 7, 4: 28}, {1: 11, 4: 44}, {1: 13, 4: 52}]
    assert allocate(costs, units, 124) == [4, 4, 4]
    assert allocate(costs, units, 123).count(4) == 2
    assert allocate(costs, units, 31) == [1, 1, 1]
    with pytest.raises(RegroupError):
        allocate(costs, units, 30)


def test_of_equal_costs_the_smaller_cache() -> None:
    units = [{g: g for g in (1, 2, 4)}] * 2
    assert allocate([{1: 0.0, 2: 0.0, 4: 0.0}] * 2, units, 100) == [1, 1]
    assert allocate([{4: 1.0, 2: 1.0, 1: 2.0}] * 2, units, 100) == [2, 2]


def test_many_layers_of_odd_sizes() -> None:
    """States are bounded by what can be reached, so this ends."""
    heads = (1, 2, 4, 8, 16, 32)
    units = [{g: g * 256 * (1 + layer % 3) for g in heads} for layer in range(64)]
    costs = [{g: (1 + layer * 7 % 13) / g for g in heads} for layer in range(64)]
    budget = sum(unit[32] for unit in units) // 4
    chosen = allocate(costs, units, budget)
    spent = sum(unit[g] for unit, g in zip(units, chosen, strict=True))
    uniform = sum(cost[8] for cost in costs)
    assert spent <= budget
    assert sum(cost[g] for cost, g in zip(costs, chosen, strict=True)) < uniform


def test_a_budget_that_is_too_small_names_one_that_is_not(llama: Layout) -> None:
    for head_dims in ((8, 8, 8), (8, 12, 20)):
        layers = [replace(layer, head_dim=D) for layer, D in zip(llama.layers, head_dims, strict=True)]
        units = [layer_units(layer) for layer in layers]
        costs = [dict.fromkeys(unit, 0.0) for unit in units]
        full = sum(token_bytes(layer, layer.num_key_value_heads) for layer in layers)
        with pytest.raises(RegroupError, match="smaller than") as error:
            allocate(costs, units, parse_budget("5%", full), full=full)
        found = re.search(r"([\d.]+)%", str(error.value.details["remedy"]))
        assert found is not None
        assert allocate(costs, units, parse_budget(found[0], full)) == [1, 1, 1]
        with pytest.raises(RegroupError):
            allocate(costs, units, parse_budget(f"{float(found[1]) - 0.02:.2f}%", full))


def test_tensor_parallel_leaves_fewer_choices(llama: Layout) -> None:
    layers = [replace(layer, num_attention_heads=12, num_key_value_heads=12) for layer in llama.layers]
    costs = {g: 1 / g for g in (1, 2, 3, 4, 6, 12)}
    for degree, expected in ((1, [6, 6, 6]), (4, [4, 4, 4])):
        units = [layer_units(layer, 2, degree) for layer in layers]
        full = sum(token_bytes(layer, 12) for layer in layers)
        chosen = allocate([{g: costs[g] for g in unit} for unit in units], units, parse_budget("50%", full), full=full)
        assert sum(unit[g] for unit, g in zip(units, chosen, strict=True)) <= full // 2
        assert chosen == expected


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_costs_that_are_not_numbers(value: float) -> None:
    with pytest.raises(RegroupError, match=r"finite[\s\S]*layer 1, 2 KV heads[\s\S]*remedy"):
        allocate([{1: 0.0}, {2: value}], [{1: 1}, {2: 2}], 10)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *(("25%", 65536), ("25 %", 65536), (" 25% ", 65536), ("100%", 262144), ("12.5%", 32768), ("3.125%", 8192)),
        *(("0.25", 65536), (".25", 65536), ("1", 262144), ("1.0", 262144), ("0.1", 26214), ("33.3%", 87293)),
        *(("64KiB", 65536), ("64 kib", 65536), ("65536B", 65536), ("65536 b", 65536), ("64kB", 64000)),
        *(("0.25MiB", 262144), ("0.1MB", 100_000), ("0.0001GiB", 107374), ("0.00001GB", 10_000), ("1B", 1)),
    ],
)
def test_budgets_in_words(text: str, expected: int) -> None:
    assert parse_budget(text, 262144) == expected


def test_shares_are_exact() -> None:
    """0.29 · 100 is below 29 in floating point."""
    assert parse_budget("29%", 100) == 29
    assert parse_budget("0.29", 100) == 29
    assert parse_budget("0.7", 10) == 7


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *((text, "cannot be read") for text in ("", " ", "%", "a", "-5%", "-1", "+5%", "1e-1", "nan", "inf", "12,5%")),
        *(
            (text, "cannot be read")
            for text in ("25%%", "5 apples", "64Ki", "64KiB/s", "1/4", "٢٥%", "9" * 5000, "0x1")
        ),
        *((text, "leaves no cache") for text in ("0", "0%", "0.0", "0B", "0KiB", "0.0001%", "0.5B")),
        *((text, "larger than the original model") for text in ("101%", "100.01%", "1MiB", "262145B")),
        *((text, r"no unit[\s\S]*remedy") for text in ("25", "65536", "1.01")),
    ],
)
def test_budgets_that_are_none(text: str, words: str) -> None:
    with pytest.raises(RegroupError, match=words) as error:
        parse_budget(text, 262144)
    assert error.value.details["expected"]
