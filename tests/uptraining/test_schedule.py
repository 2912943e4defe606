"""Learning-rate factors against literal values."""

import math

import pytest

from regroup.uptraining.schedule import SCHEDULES, schedule


def values(name: str, steps: int, **settings: float | int) -> list[float]:
    factor = schedule(name, steps, **settings)  # type: ignore[arg-type]
    return [factor(step) for step in range(steps)]


def test_cosine_warms_up_and_falls() -> None:
    assert values("cosine", 4) == pytest.approx([1, 0.8535534, 0.5, 0.1464466])
    assert values("cosine", 8, warmup=0.5) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.8535534, 0.5, 0.1464466])


def test_constant_then_decay() -> None:
    assert values("constant-decay", 10, warmup=0.2, decay=0.4) == pytest.approx(
        [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    )
    assert values("constant-decay", 3, decay=0.0) == [1, 1, 1]
    assert values("constant-decay", 4, decay=1.0) == [1, 0.75, 0.5, 0.25]


def test_constant() -> None:
    assert values("constant", 4, warmup=0.5) == [0.5, 1, 1, 1]


def test_t5_resumes_from_the_original_step() -> None:
    factor = schedule("inverse-sqrt", 50_000, warmup=0.5, original_steps=1_000_000)
    rate = 1 / math.sqrt(1_000_000)
    for step in (0, 1, 25_000, 49_999):
        assert rate * factor(step) == pytest.approx(1 / math.sqrt(1_000_000 + step), rel=1e-12)
    assert rate * factor(0) == pytest.approx(0.001)


def test_t5_from_scratch_is_constant_for_ten_thousand_steps() -> None:
    factor = schedule("inverse-sqrt", 50_000)
    assert [factor(step) for step in (0, 9_999, 10_000)] == [1, 1, 1]
    assert 0.01 * factor(40_000) == pytest.approx(1 / math.sqrt(40_000))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_short_runs_stay_in_range(name: str, steps: int) -> None:
    assert all(0 < value <= 1 for value in values(name, steps, warmup=0.05, decay=0.2, original_steps=5))


def test_a_floor() -> None:
    assert values("cosine", 2, floor=0.1) == pytest.approx([1, 0.55])
