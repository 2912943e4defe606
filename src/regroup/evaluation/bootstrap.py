"""How sure a figure is: rows drawn with replacement, as Efron and Tibshirani 1993 (chapters 13 and 15) do."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

RESAMPLES = 1000
LEVEL = 0.95
_CELLS = 10_000_000


@dataclass(frozen=True)
class Interval:
    """A value with its 95% percentile interval over resampled rows; a single row has none (nan)."""

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
    if len(rows) < 2:
        return Interval(value(rows.sum(0)), math.nan, math.nan)
    drawn = np.array([value(sums) for sums in _resampled(rows, seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value(rows.sum(0)), float(low), float(high))


@dataclass(frozen=True)
class Difference:
    """What one model has more than another on the same rows.

    Attributes:
        value, low, high: with its 95% interval; a single row has none (nan).
        p: two-sided: twice the smaller share of draws in which the difference is at most, or at least, zero; never
            below 2 / (draws + 1) (Koehn 2004 for paired draws; Davison and Hinkley 1997, section 4.4, for the 1), nor
            below 2 / 2^rows, the least that the exact sign test has: resampling few rows pretends to know more.
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
    whole = value(first.sum(0)) - value(second.sum(0))
    if len(first) < 2:
        return Difference(whole, math.nan, math.nan, 1.0)
    draws = zip(_resampled(first, seed), _resampled(second, seed), strict=True)
    drawn = np.array([value(mine) - value(others) for mine, others in draws])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    least = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
    p = min(1.0, max(2 * (least + 1) / (len(drawn) + 1), 2.0 ** (1 - len(first))))
    return Difference(whole, float(low), float(high), p)


def _resampled(rows: np.ndarray, seed: int) -> np.ndarray:
    """Sums over the rows of each draw, (draws, k); equal for equal seeds and numbers of rows."""
    generator = np.random.default_rng(seed)
    count = len(rows)
    share = np.full(count, 1 / count)
    # A million rows' draws would take gigabytes at once.
    size = max(1, min(RESAMPLES, _CELLS // count))
    parts = [min(size, RESAMPLES - first) for first in range(0, RESAMPLES, size)]
    return np.concatenate([generator.multinomial(count, share, part).astype(np.float64) @ rows for part in parts])
