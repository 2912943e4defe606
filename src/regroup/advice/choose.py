"""Which candidate: the Pareto front, the knee, and the cheapest that keeps to its limits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..errors import RegroupError

# KV heads.
CONVENTIONAL = 8


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


@dataclass(frozen=True)
class Choice:
    """What is recommended, and why.

    Attributes:
        prediction: of the candidate.
        reason: ``"limits"``: the fastest within a loss; ``"knee"``; ``"no knee"``: what comes nearest to one where
            every candidate lies on or above the chord; ``"convention"``: nothing is known of loss; ``"nothing else"``:
            the original model is all there is within the limits.
        distance: from the chord, where that was asked for (``knee_distances``).
    """

    prediction: Prediction
    reason: str
    distance: float | None = None


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


def knee_distances(found: Sequence[Prediction]) -> list[float]:
    """How far each candidate lies below the chord, in axes of cache and loss that both go from 0 to 1.

    The chord joins the largest cache without loss to the smallest cache with the most loss: with x and y the cache and
    the loss of a candidate, each less the least of all and divided by the range, it is x + y = 1, and the distance is
    (1 - x - y) / √2. Where it is largest is the knee (Satopää et al. 2011, "Finding a 'Kneedle' in a Haystack", ICDCS
    workshops: the difference curve, of a curve that is convex and falls, without smoothing). On or above the chord it
    is 0 or negative.

    Args:
        found: candidates whose loss, or lost energy, is known.
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
    """Of uniform candidates the one nearest to convention, for a model of whose loss nothing is known.

    That is 8 KV heads, the paper's choice (Ainslie et al. 2023, section 3.3) and since then that of Llama 2 and 3 and
    of Mistral; of a model that has no more than 8, half of what it has. Near is near in ratio; of two that are equally
    near, the one with more KV heads.
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
    """The candidate to recommend, among those that fit and keep to the loss and to the time.

    With ``max_loss`` it is the fastest. Without, it is the one at the knee of cache against loss (``knee_distances``,
    over all candidates) other than the original model; where nothing is known of losses, the ``conventional`` one.

    Args:
        found: the original model first.
        batch: sequences that must fit.
        max_loss: nats per token at most.
        max_seconds: per token at most.

    Raises:
        RegroupError: none does; it says which comes nearest.
    """
    limits: list[tuple[Callable[[Prediction], bool], Callable[[Prediction], float], str]] = [
        (lambda p: p.largest_batch >= batch, lambda p: -p.largest_batch, "a batch of {:.0f}"),
    ]
    if max_seconds is not None:
        limits.append((lambda p: p.token_seconds <= max_seconds, lambda p: 1e3 * p.token_seconds, "{:.4g} ms a token"))
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
