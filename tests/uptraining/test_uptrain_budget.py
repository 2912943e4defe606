"""The arithmetic of a run's length and cost, against sums that were done by hand."""

from __future__ import annotations

from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regroup import RegroupError
from regroup.uptraining.budget import KNOWN_PRETRAINING_TOKENS, known_pretraining_tokens, parse_count, plan_budget

SIZES: dict[str, Any] = {"batch_size": 4, "window": 8, "parameters": 1000, "layers": 3, "hidden": 5}


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("2T", 2 * 10**12),
        ("300B", 300 * 10**9),
        ("65k", 65_000),
        ("1.5M", 1_500_000),
        ("1000", 1000),
        (" 1_000 ", 1000),
        ("1,000", 1000),
        (".5k", 500),
        ("0.0000000000015T", None),
        (7, 7),
    ],
)
def test_counts(text: str | int, count: int | None) -> None:
    if count is None:
        with pytest.raises(RegroupError, match="cannot be read"):
            parse_count(text)
    else:
        assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "2X", "T", "1e6", "two", "1 2", "0.0001k", "inf", -3, 0])
def test_what_is_not_a_count(text: str | int) -> None:
    with pytest.raises(RegroupError, match="cannot be read"):
        parse_count(text)


def test_alpha_becomes_tokens_steps_and_flops() -> None:
    budget = plan_budget(alpha=0.05, pretraining_tokens=10_000, teacher_parameters=1100, **SIZES)
    # 500 tokens asked for; 32 a step: 15.6 steps, rounded up.
    assert (budget.asked_tokens, budget.tokens_per_step, budget.steps, budget.tokens) == (500, 32, 16, 512)
    assert budget.student_flops == 512 * (6 * 1000 + 12 * 3 * 5 * 8)
    assert budget.teacher_flops == 512 * (2 * 1100 + 4 * 3 * 5 * 8)
    assert (budget.alpha, budget.pretraining_tokens) == (0.05, 10_000)


def test_embeddings_that_are_looked_up_cost_nothing() -> None:
    plain = plan_budget(steps=1, **SIZES)
    looked_up = plan_budget(steps=1, embedding_parameters=100, teacher_parameters=1000, **SIZES)
    assert plain.student_flops - looked_up.student_flops == 6 * 100 * 32
    assert looked_up.teacher_flops * 3 == looked_up.student_flops
    other = plan_budget(steps=1, teacher_parameters=1000, teacher_embedding_parameters=40, **SIZES)
    assert other.teacher_flops == 32 * (2 * 960 + 4 * 3 * 5 * 8)


def test_tokens_and_steps() -> None:
    assert plan_budget(steps=3, **SIZES).tokens == 96
    assert plan_budget(tokens=96, **SIZES).steps == 3
    assert plan_budget(tokens=97, **SIZES).steps == 4
    assert plan_budget(tokens=1, **SIZES).tokens == 32
    assert plan_budget(steps=3, **SIZES).alpha is None
    assert plan_budget(steps=3, pretraining_tokens=960, **SIZES).alpha == 0.1
    assert plan_budget(steps=3, **SIZES).teacher_flops == 0


def test_alpha_is_a_decimal() -> None:
    """As floats, 0.07 · 100 is above 7, and would be rounded up to 8 tokens."""
    assert ceil(0.07 * 100) == 8
    assert plan_budget(alpha=0.07, pretraining_tokens=100, **SIZES).asked_tokens == 7


@given(st.integers(1, 10**4), st.integers(1, 10**13), st.integers(1, 4096), st.integers(1, 8192))
def test_rounding_is_up_and_by_less_than_a_step(alpha: int, pretraining: int, batch: int, window: int) -> None:
    budget = plan_budget(
        alpha=alpha / 10**4,
        pretraining_tokens=pretraining,
        batch_size=batch,
        window=window,
        parameters=10,
        layers=1,
        hidden=1,
    )
    exact = Fraction(alpha, 10**4) * pretraining
    assert 0 <= budget.tokens - exact < batch * window + 1
    assert budget.tokens == budget.steps * batch * window
    assert budget.steps >= 1


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "not given"),
        ({"pretraining_tokens": 100}, "not given"),
        ({"tokens": 5, "steps": 5}, "more than once"),
        ({"alpha": 0.1, "pretraining_tokens": 10, "steps": 5}, "more than once"),
        ({"alpha": 0.05}, "--pretraining-tokens"),
        ({"alpha": 0.0, "pretraining_tokens": 100}, "above 0"),
        ({"alpha": -0.1, "pretraining_tokens": 100}, "above 0"),
        ({"alpha": 1.01, "pretraining_tokens": 100}, "at most 1"),
        ({"alpha": float("nan"), "pretraining_tokens": 100}, "at most 1"),
        ({"steps": 0}, "steps of a budget"),
        ({"tokens": -1}, "tokens of a budget"),
        ({"steps": 1, "batch_size": 0}, "batch size"),
        ({"steps": 1, "window": 0}, "window"),
    ],
)
def test_lengths_that_cannot_be(given: dict[str, Any], words: str) -> None:
    with pytest.raises(RegroupError, match=words):
        plan_budget(**SIZES | given)


def test_the_arithmetic_is_told() -> None:
    budget = plan_budget(alpha=0.05, pretraining_tokens=10_000, teacher_parameters=1000, **SIZES)
    lines = "\n".join(budget.explain())
    for part in ("α = 0.05 of 10,000", "500 tokens / 32", "16 steps", "512 tokens", "student", "teacher", "33%"):
        assert part in lines
    assert "teacher" not in "\n".join(plan_budget(steps=3, **SIZES).explain())
    assert "α" not in "\n".join(plan_budget(steps=3, **SIZES).explain())


def test_known_parents() -> None:
    assert known_pretraining_tokens("meta-llama/Llama-2-7b-hf") == KNOWN_PRETRAINING_TOKENS["meta-llama/Llama-2-"]
    found = known_pretraining_tokens("eleutherai/pythia-160m-deduped")
    assert found is not None
    assert found[0] == 299_892_736_000
    t5 = known_pretraining_tokens("google/t5-v1_1-large")
    assert t5 is not None
    assert t5[0] == 2**20 * 10**6
    for name in ("someone/Llama-2-7b", "bigscience/bloom-560m", "gpt2", "", "/models/child", "microsoft/phi-2-x"):
        assert known_pretraining_tokens(name) is None
    assert all(tokens > 10**11 and source for tokens, source in KNOWN_PRETRAINING_TOKENS.values())
