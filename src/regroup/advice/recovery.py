"""The loss of a conversion that remains after uptraining: a curve fitted to the records of `uptraining_curve.py`.

`recovery.json` next to this file contains the fit of `recipes/fit_recovery.py`; a test repeats it.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from importlib.resources import files
from typing import Any


@dataclass(frozen=True)
class Recovery:
    """The share of the excess loss that remains after t tokens of distillation: (1 + t / scale)^-power.

    Attributes:
        scale: tokens.
        power: of the decay.
        error: geometric mean of the factors between predicted and measured shares of a model that was not in the fit.
        additivity: geometric mean of the loss of whole models over the sum of the losses of their single layers.
        additivity_error: factor by which single models differ from it.
        source: of the measurements.
    """

    scale: float
    power: float
    error: float
    additivity: float
    additivity_error: float
    source: str

    def share(self, tokens: int) -> float:
        """The share of the excess that remains after so many tokens."""
        return (1 + tokens / self.scale) ** -self.power

    @classmethod
    def load(cls) -> Recovery:
        """The fit that comes with the package."""
        return cls(**json.loads(files(__package__ or "regroup.advice").joinpath("recovery.json").read_text("utf-8")))


def fit(curves: list[list[tuple[int, float]]]) -> tuple[float, float]:
    """Scale and power of the least-squares fit to measured shares, in logarithms, by a search over scales.

    Args:
        curves: for each model, tokens and the remaining share of the excess.
    """
    points = [(tokens, share) for curve in curves for tokens, share in curve if tokens]
    best = (math.inf, 1.0, 1.0)
    for step in range(241):
        scale = 10 ** (2 + step / 40)  # 100 tokens to 100 million
        logs = [math.log1p(tokens / scale) for tokens, _ in points]
        wanted = [-math.log(share) for _, share in points]
        power = sum(x * y for x, y in zip(logs, wanted, strict=True)) / sum(x * x for x in logs)
        error = sum((power * x - y) ** 2 for x, y in zip(logs, wanted, strict=True))
        best = min(best, (error, scale, power))
    return best[1], best[2]


def left_out_error(models: list[list[list[tuple[int, float]]]]) -> float:
    """Geometric mean of the factors between predicted and measured shares of models that are not in the fit.

    Args:
        models: for each model its curves, one per number of KV heads.
    """
    errors: list[float] = []
    for number, left_out in enumerate(models):
        scale, power = fit([curve for other, curves in enumerate(models) if other != number for curve in curves])
        errors += [
            abs(-power * math.log1p(tokens / scale) - math.log(share))
            for curve in left_out
            for tokens, share in curve
            if tokens
        ]
    return math.exp(sum(errors) / len(errors))


def curves_of(record: dict[str, Any]) -> list[list[tuple[int, float]]]:
    """Regroup's own curves of an uptraining record: tokens and remaining share of the excess, for each G."""
    rows = [row for row in record["results"]["table"] if row["way"].endswith("(ours)")]
    found = []
    for heads in dict.fromkeys(row["num_key_value_heads"] for row in rows):
        own = sorted(
            (row["tokens"], row["excess_nats_per_token"]) for row in rows if row["num_key_value_heads"] == heads
        )
        found.append([(tokens, excess / own[0][1]) for tokens, excess in own])
    return found
