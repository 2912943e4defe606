"""Comparison of two models whose runs share their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import atan, cos, inf, pi, sqrt
from statistics import mean, stdev


@dataclass(frozen=True)
class Difference:
    """Of two models, over seeds.

    Attributes:
        mean: of the differences.
        standard_error: of that mean; None for one seed.
        p: of the two-sided paired t-test; None for one seed.
    """

    mean: float
    standard_error: float | None
    p: float | None


def compare(values: Sequence[float], others: Sequence[float]) -> Difference:
    """Values less the others, which have the same seeds in the same order.

    Raises:
        ValueError: numbers of seeds differ.
    """
    found = [value - other for value, other in zip(values, others, strict=True)]
    if len(found) < 2:
        return Difference(mean(found), None, None)
    error = stdev(found) / sqrt(len(found))
    t = abs(mean(found)) / error if error else (inf if mean(found) else 0.0)
    return Difference(mean(found), error, t_test(t, len(found) - 1))


def t_test(t: float, freedom: int, *, steps: int = 1000) -> float:
    """Two-sided p of Student's t.

    With t = √ν tan θ its density is cos^(ν-1) θ, up to a factor, which Simpson's rule integrates without loss.

    Args:
        t: the statistic, not negative.
        freedom: degrees of freedom, ν, at least 1.
        steps: of the integration; even.
    """

    def integral(end: float) -> float:
        width = end / steps
        values = [cos(width * step) ** (freedom - 1) for step in range(steps + 1)]
        return width / 3 * (values[0] + values[-1] + 4 * sum(values[1::2]) + 2 * sum(values[2:-1:2]))

    return max(0.0, 1 - integral(atan(t / sqrt(freedom))) / integral(pi / 2))
