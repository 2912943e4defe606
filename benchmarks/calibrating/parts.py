"""The parts of a conversion on text that are told apart, and the sizes that are measured."""

from __future__ import annotations

from dataclasses import dataclass

# Every part that is told apart, by what it is: the table has them in this order.
FORWARD = ("parent forward", "search forward", "candidate forward", "refit forward", "child forward")
ALGEBRA = (
    "search moments",
    "moments",
    "head search",
    "solve keys",
    "solve values",
    "candidate sums",
    "candidate solve",
    "refit sums",
    "refit solve",
)
REST = ("load", "copy weights", "held-out KL", "write", "other")


@dataclass(frozen=True)
class Shape:
    """The parent, but for its layers, and what becomes of it."""

    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    vocabulary: int = 32000
    window: int = 2048
    kv_heads: int = 8

    def parameters(self, layers: int) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


TINY = Shape(hidden=64, intermediate=128, heads=8, vocabulary=256, window=64, kv_heads=2)


@dataclass(frozen=True)
class Point:
    """One measurement."""

    layers: int
    windows: int


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Seconds in forward passes and in linear algebra, and how these compare."""
    forward, algebra = (sum(parts[part] for part in group) for group in (FORWARD, ALGEBRA))
    return {
        "forward_seconds": forward,
        "linear_algebra_seconds": algebra,
        "linear_algebra_to_forward": algebra / forward,
    }
