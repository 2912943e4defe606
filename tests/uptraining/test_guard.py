"""The guard of the loss, step by step."""

import math

import pytest

from regroup.errors import RegroupError
from regroup.uptraining.guard import ENOUGH, PATIENCE, WINDOW, LossGuard


def guard(factor: float = 2.0, state: str | None = "out/checkpoint-8") -> LossGuard:
    return LossGuard(factor, lambda: (1.0, None), lambda began: state)


def calm(watch: LossGuard, steps: int, loss: float = 3.0, first: int = 1) -> None:
    for step in range(first, first + steps):
        watch.check(step, loss + 0.1 * math.sin(step), 1.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_a_number_stops_at_once(value: float) -> None:
    with pytest.raises(RegroupError, match=r"loss is not a number(.|\n)*step 1(.|\n)*checkpoint-8") as error:
        guard().check(1, value)
    assert "lower --learning-rate" in str(error.value)
    with pytest.raises(RegroupError, match="gradient is not a number"):
        guard().check(1, 1.0, value)


def test_without_a_saved_state_it_says_so() -> None:
    with pytest.raises(RegroupError, match="nothing was saved yet"):
        guard(state=None).check(1, math.nan)


def test_a_spike_that_passes_is_counted() -> None:
    watch = guard()
    calm(watch, 40)
    for step in range(PATIENCE - 1):
        watch.check(41 + step, 7.0)
    assert (watch.spikes, watch.high, watch.began) == (1, PATIENCE - 1, 41)
    calm(watch, 1, first=60)
    watch.check(61, 9.0)
    assert (watch.spikes, watch.high, watch.began) == (2, 1, 61)
    assert watch.largest == pytest.approx(3, rel=0.05)


def test_a_loss_that_stays_high_stops() -> None:
    asked: list[int | None] = []
    watch = LossGuard(2.0, lambda: (1.0, None), lambda began: asked.append(began))
    calm(watch, ENOUGH)
    with pytest.raises(RegroupError, match="diverged"):
        calm(watch, PATIENCE, loss=6.5, first=50)
    assert asked == [50]


def test_high_losses_do_not_move_the_median() -> None:
    watch = guard()
    calm(watch, ENOUGH)
    for _ in range(WINDOW):
        calm(watch, 4)
        watch.check(1, 8.0)
    assert watch.spikes == WINDOW
    assert max(watch.state_dict()["losses"]) < 4


def test_what_is_no_spike() -> None:
    watch = guard()
    calm(watch, ENOUGH - 1)
    watch.check(16, 50.0)  # too early to tell
    calm(watch, 40)
    watch.check(60, 5.9)  # below twice the median
    small = guard()
    calm(small, 40, loss=0.0)
    small.check(41, 0.09)  # many times the median, and next to nothing
    off = guard(factor=0)
    calm(off, 40)
    calm(off, 40, loss=100)
    assert watch.spikes == small.spikes == off.spikes == 0


def test_its_memory_can_be_kept() -> None:
    one, other = guard(), guard()
    calm(one, 30)
    one.check(31, 10.0)
    other.load_state_dict(one.state_dict())
    assert other.state_dict() == one.state_dict()
    with pytest.raises(RegroupError, match="diverged"):
        calm(other, PATIENCE - 1, loss=10)


def test_the_trainer_asks_before_the_optimizer_steps() -> None:
    watch = LossGuard(2.0, lambda: (math.nan, 1.0), lambda began: None)

    class State:
        global_step = 4

    with pytest.raises(RegroupError, match="step 5"):
        watch.on_pre_optimizer_step(None, State(), None)  # type: ignore[arg-type]
