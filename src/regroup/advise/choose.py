"""Which candidate: the Pareto front, and the cheapest that keeps to its limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import RegroupError


@dataclass(frozen=True)
class Prediction:
    """What is predicted of one candidate.

    Attributes:
        name: such as ``"G = 8"`` or ``"by layer, as G = 8"``: within the cache that G = 8 takes.
        kv_heads: of every layer; None where layers differ.
        heads: of each layer.
        weights_bytes, cache_bytes, memory_bytes: of a device; the last with working memory.
        largest_batch: sequences that fit.
        token_seconds: a step, of which every sequence gets one token.
        first_token_seconds: of the whole batch's prompt, at least.
        loss: nats a token over the parent before uptraining, or None without text.
        loss_low, loss_high: of it, by the error that was seen elsewhere.
        loss_after: after uptraining, where that is asked for; with
        loss_after_low, loss_after_high: its range.
        energy: share of the heads' energy that is lost, from the weights alone; ranks candidates, and is no loss.
    """

    name: str
    kv_heads: int | None
    heads: dict[str, int]
    weights_bytes: int
    cache_bytes: int
    memory_bytes: int
    largest_batch: int
    token_seconds: float
    first_token_seconds: float
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    loss_after: float | None = None
    loss_after_low: float | None = None
    loss_after_high: float | None = None
    energy: float | None = None

    @property
    def judged(self) -> float | None:
        """What candidates are compared by: the loss in the end, before it, or the lost energy."""
        for value in (self.loss_after, self.loss, self.energy):
            if value is not None:
                return value
        return None


def pareto(found: Sequence[Prediction]) -> list[bool]:
    """Whether nothing is both faster and better, or equal in one and better in the other; True where loss is not known.

    Fast is the time a token; of equal times the smaller cache counts as faster.
    """

    def beaten(one: Prediction, other: Prediction) -> bool:
        mine, theirs = one.judged, other.judged
        if mine is None or theirs is None:
            return False
        cost, rival = ((p.token_seconds, p.cache_bytes) for p in (one, other))
        return rival <= cost and theirs <= mine and (rival < cost or theirs < mine)

    return [not any(beaten(one, other) for other in found) for one in found]


def choose(
    found: Sequence[Prediction],
    *,
    batch: int,
    max_loss: float | None,
    max_seconds: float | None,
) -> Prediction:
    """The fastest candidate that fits, keeps to the loss and to the time.

    Without ``max_loss`` it is the one with the least loss that keeps to the others; without any limit that anything
    misses, that is the parent itself. Where nothing is known of losses, more KV heads are taken to lose less.

    Raises:
        RegroupError: none does; it says which comes nearest.
    """
    limits: list[tuple[Callable[[Prediction], bool], Callable[[Prediction], float], str]] = [
        (lambda p: p.largest_batch >= batch, lambda p: -p.largest_batch, "a batch of {:.0f}"),
    ]
    if max_seconds is not None:
        limits.append((lambda p: p.token_seconds <= max_seconds, lambda p: p.token_seconds, "{:.4g} s a token"))
    if max_loss is not None:

        def loss(one: Prediction) -> float:
            return math.inf if one.judged is None else one.judged

        limits.append((lambda p: loss(p) <= max_loss, loss, "{:.4g} nats a token"))
    left = list(found)
    for keeps, measure, words in limits:
        kept = [p for p in left if keeps(p)]
        if not kept:
            nearest = min(left, key=measure)
            raise RegroupError(
                "no number of KV heads keeps to the limits",
                got=f"at best {words.format(abs(measure(nearest)))}, with {nearest.name}",
                remedy="loosen a limit, or change batch, context, hardware or the tokens of uptraining",
            )
        left = kept
    if max_loss is not None:
        return min(left, key=lambda p: (p.token_seconds, p.cache_bytes, p.judged or 0.0))
    if all(p.judged is None for p in left):
        return min(left, key=lambda p: (-p.cache_bytes, p.token_seconds))
    return min(left, key=lambda p: (p.judged or 0.0, p.token_seconds, p.cache_bytes))
