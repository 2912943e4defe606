"""How sure a figure is: rows drawn with replacement, as Efron and Tibshirani 1993 (chapters 13 and 15) do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A value with its 95% percentile interval over resampled rows."""

    value: float
    low: float
    high: float


def interval(rows: np.ndarray, value: Callable[[np.ndarray], float], *, seed: int = 0) -> Interval:
    """The value of a metric and its interval.

    Args:
        rows: numbers of each row, (rows, k).
        value: sums of them, (k,), to the metric.
        seed: of the draws.
    """
    drawn = np.array([value(sums) for sums in _resampled(rows, seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value(rows.sum(0)), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """What one model has more than another on the same rows.

    Attributes:
        value, low, high: with its 95% interval.
        p: two-sided: twice the smaller share of draws in which the difference is at most, or at least, zero; never
            below 2 / (draws + 1) (Koehn 2004 for paired draws; Davison and Hinkley 1997, section 4.4, for the 1).
    """

    value: float
    low: float
    high: float
    p: float


def paired(first: np.ndarray, second: np.ndarray, value: Callable[[np.ndarray], float], *, seed: int = 0) -> Difference:
    """Compare two models on equal rows: every draw takes the same rows of both.

    Args:
        first, second: numbers of each row, (rows, k), of either model.
        value: sums of them to the metric.
        seed: of the draws.
    """
    assert first.shape == second.shape
    draws = zip(_resampled(first, seed), _resampled(second, seed), strict=True)
    drawn = np.array([value(mine) - value(others) for mine, others in draws])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    least = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, 2 * (least + 1) / (len(drawn) + 1))
    return Difference(value(first.sum(0)) - value(second.sum(0)), float(low), float(high), p)


def _resampled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Sums over the rows of each draw, (draws, k); equal for equal seeds and numbers of rows."""
    generator = np.random.default_rng(seed)
    count = len(rows)
    times = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    return times.astype(np.float64) @ rows
