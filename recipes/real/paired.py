"""Means and paired differences over windows of equal text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

Windows = Sequence[dict[str, Any]]


def mean_of(windows: Windows, name: str) -> float:
    """Mean over tokens of a quantity that is given as the mean of each window."""
    return sum(window[name] * window["tokens"] for window in windows) / sum(window["tokens"] for window in windows)


def excess(windows: Windows) -> list[float]:
    """Of each window, nats per token over the original model."""
    return [window["nats"] - window["original_nats"] for window in windows]


def mean_and_error(values: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """Mean over tokens of the windows' means, and its standard error, taking each window as one draw.

    As ``regroup.evaluation.score`` does it: the error of a ratio of sums, by linearisation. NaN for one window.
    """
    total = sum(tokens)
    mean = sum(value * count for value, count in zip(values, tokens, strict=True)) / total
    n = len(values)
    if n < 2:
        return mean, math.nan
    spread = sum(((value - mean) * count) ** 2 for value, count in zip(values, tokens, strict=True)) / (n - 1)
    return mean, math.sqrt(spread * n) / total


def over_seeds(runs: Sequence[Windows]) -> list[float]:
    """Of each window, the mean excess over seeds."""
    return [sum(values) / len(values) for values in zip(*map(excess, runs), strict=True)]


def difference(runs: Sequence[Windows], others: Sequence[Windows]) -> tuple[float, float]:
    """Loss of one way less that of another, and its standard error over windows, each a mean over its seeds."""
    tokens = [window["tokens"] for window in runs[0]]
    pairs = zip(over_seeds(runs), over_seeds(others), strict=True)
    return mean_and_error([one - other for one, other in pairs], tokens)
