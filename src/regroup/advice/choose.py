"""The choice of a candidate: the Pareto front, the knee, and the fastest candidate within limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import RegroupError

# KV heads that most models have.
CONVENTIONAL = 8


@dataclass(frozen=True)
class Prediction:
    """The prediction for one candidate.

    Attributes:
        name: such as ``"8 KV heads"`` or ``"by layer, as 8 KV heads"``: with the same cache.
        kv_heads: num_key_value_heads of every layer; None if layers differ.
        heads: num_key_value_heads by layer.
        weights_bytes, cache_bytes, memory_bytes: per device; the last includes working memory.
        largest_batch: sequences that fit.
        token_seconds: seconds of a step, which gives each sequence one token.
        first_token_seconds: least seconds for the prompts of the whole batch.
        loss: nats per token above the original model before uptraining; None without text.
        loss_low, loss_high: its range, from the errors of earlier predictions.
        loss_after, loss_after_low, loss_after_high: the same after uptraining, or None.
        energy: lost share of the heads' energy, from the weights only; it ranks candidates, but is not a loss.
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
        """The value to compare candidates by: the final loss, the loss before uptraining, or the lost energy."""
        for value in (self.loss_after, self.loss, self.energy):
            if value is not None:
                return value
        return None


@dataclass(frozen=True)
class Choice:
    """The recommendation, and its reason.

    Attributes:
        prediction: the recommended candidate.
        reason: ``"limits"``: the fastest within a loss; ``"knee"``; ``"no knee"``: the candidate
            nearest to the chord, if none is below it; ``"convention"``: the loss is unknown; ``"nothing else"``: only
            the original model is within the limits.
        distance: from the chord (``knee_distances``), or None.
    """

    prediction: Prediction
    reason: str
    distance: float | None = None


def pareto(found: Sequence[Prediction]) -> list[bool]:
    """Whether no other candidate is at least as fast and as good, and better in one; True if the loss is unknown.

    Speed is the time per token; of equal times, the smaller cache counts as faster.
    """

    def beaten(one: Prediction, other: Prediction) -> bool:
        mine, theirs = one.judged, other.judged
        if mine is None or theirs is None:
            return False
        cost, rival = ((p.token_seconds, p.cache_bytes) for p in (one, other))
        return rival <= cost and theirs <= mine and (rival < cost or theirs < mine)

    return [not any(beaten(one, other) for other in found) for one in found]


def knee_distances(found: Sequence[Prediction]) -> list[float]:
    """The distance of each candidate below the chord, with cache and loss scaled to 0 to 1.

    The chord connects the largest cache without loss to the smallest cache with the most loss: with x and y the cache
    and the loss of a candidate, each minus the minimum and divided by the range, it is x + y = 1, and the distance is
    (1 - x - y) / √2. Where it is largest is the knee (Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack", ICDCS
    workshops: the difference curve, for a convex decreasing curve, without smoothing). On or above the chord it
    is 0 or negative.

    Args:
        found: candidates with known loss or lost energy.
    """
    caches = [float(p.cache_bytes) for p in found]
    losses = [p.judged for p in found]
    assert all(loss is not None for loss in losses)

    def normalised(values: Sequence[float]) -> list[float]:
        least, most = min(values), max(values)
        return [(value - least) / (most - least) if most > least else 0.0 for value in values]

    xs, ys = normalised(caches), normalised([loss or 0.0 for loss in losses])
    return [(1 - x - y) / math.sqrt(2) for x, y in zip(xs, ys, strict=True)]


def conventional(found: Sequence[Prediction], original: Prediction) -> Prediction:
    """The uniform candidate nearest to the conventional number, for a model with unknown loss.

    That is 8 KV heads, the paper's choice (Ainslie et al. 2023, section 3.3) and since then that of Llama 2 and 3 and
    of Mistral; for a model with at most 8, half of its number. Distance is the ratio; of two at
    the same distance, the one with more KV heads.
    """
    most = max(original.heads.values())
    wanted = CONVENTIONAL if most > CONVENTIONAL else most / 2
    uniform = [(p.kv_heads, p) for p in found if p.kv_heads is not None]
    if not uniform:
        return max(found, key=lambda p: p.cache_bytes)
    return min(uniform, key=lambda pair: (abs(math.log(pair[0] / wanted)), -pair[0]))[1]


def choose(
    found: Sequence[Prediction],
    *,
    batch: int,
    max_loss: float | None,
    max_seconds: float | None,
) -> Choice:
    """The candidate to recommend, among those within the limits of memory, loss and time.

    With ``max_loss`` it is the fastest. Without it, the one at the knee of cache against loss (``knee_distances`` over
    all candidates) except the original model; if losses are unknown, the ``conventional`` one.

    Args:
        found: the original model first.
        batch: sequences that must fit.
        max_loss: nats per token at most.
        max_seconds: per token at most.

    Raises:
        RegroupError: no candidate is within the limits; the nearest is named.
    """
    limits: list[tuple[Callable[[Prediction], bool], Callable[[Prediction], float], str]] = [
        (lambda p: p.largest_batch >= batch, lambda p: -p.largest_batch, "a batch of {:.0f}"),
    ]
    if max_seconds is not None:
        limits.append(
            (lambda p: p.token_seconds <= max_seconds, lambda p: 1e3 * p.token_seconds, "{:.4g} ms per token")
        )
    if max_loss is not None:

        def loss(one: Prediction) -> float:
            return math.inf if one.judged is None else one.judged

        limits.append((lambda p: loss(p) <= max_loss, loss, "{:.4g} nats per token"))
    left = list(found)
    for keeps, measure, words in limits:
        kept = [p for p in left if keeps(p)]
        if not kept:
            nearest = min(left, key=measure)
            raise RegroupError(
                "no number of KV heads is within the limits",
                got=f"at best {words.format(abs(measure(nearest)))}, with {nearest.name}",
                remedy="loosen a limit, or change batch, context, hardware or the tokens of uptraining",
            )
        left = kept
    original = found[0]
    others = [p for p in left if p is not original]
    if max_loss is not None:
        fastest = min(left, key=lambda p: (p.token_seconds, p.cache_bytes, p.judged or 0.0))
        return Choice(fastest, "limits")
    if not others:
        return Choice(original, "nothing else")
    if any(p.judged is None for p in found):
        return Choice(conventional(others, original), "convention")
    distances = {id(p): d for p, d in zip(found, knee_distances(found), strict=True)}
    best = max(others, key=lambda p: (distances[id(p)], -(p.judged or 0.0), -p.token_seconds, -p.cache_bytes))
    return Choice(best, "knee" if distances[id(best)] > 0 else "no knee", distances[id(best)])
