"""From a plan that fits a budget to a better one: KV heads are exchanged between layers while the whole model gains.

The costs of single layers do not add up: a layer that is harmless alone may be needed once its neighbours are
converted. So the knapsack's plan (``budget.allocate``) is only where the search starts; what decides is the loss of
the model with all of its layers converted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .budget import allocate

Heads = tuple[int, ...]
Costs = list[dict[int, float]]

# Exchanges are tried so many at a time, since trials share the layers that they have in common; and a search ends when
# so many batches in a row brought nothing.
_BATCH, _PATIENCE = 8, 4
# The share of the loss that a move has to gain: less is noise of the arithmetic.
_GAIN = 1e-4


@dataclass(frozen=True)
class Refined:
    """The plan that was found, and the one that the search began with.

    Attributes:
        heads, loss: KV heads of each layer, and the loss of the whole model with them.
        start, start_loss: those of the knapsack, which minimises the sum of the single layers' costs.
        trials: how many plans were tried.
        settled: every change of one layer and every exchange between two was tried on the plan, and none gains.
    """

    heads: Heads
    loss: float
    start: Heads
    start_loss: float
    trials: int
    settled: bool


def trial_limit(choices: Sequence[Sequence[int]]) -> int:
    """How many plans ``refine`` may try for layers with these choices: some rounds of all changes, and never many."""
    return min(1024, 64 + 8 * sum(len(numbers) - 1 for numbers in choices))


def refine(
    costs: Sequence[Mapping[int, float]],
    units: Sequence[Mapping[int, int]],
    budget: int,
    losses: Callable[[list[Heads]], list[float]],
    *,
    limit: int | None = None,
) -> Refined:
    """Find numbers of KV heads within a budget whose joint loss no exchange lowers.

    Plans to start from are the knapsack's for the costs of layers alone in the original model, for those of keeping
    each layer in the smallest model, and for their means; and one number for all layers. From the best of them on
    coordinate moves follow: each layer alone is changed within the model as it is, which gives what the change gains;
    then exchanges (one layer gets more, another less) are tried in the order of the sum of their two gains, along with
    the knapsack for these gains, until none lowers the loss or the limit is reached.

    Args:
        costs: for each layer, what each number of KV heads costs while the other layers are the original ones.
        units, budget: what each takes, and the most that all may take (see ``budget.allocate``).
        losses: gives the losses of whole models for the numbers of KV heads of each layer.
        limit: how many plans may be tried; by default ``trial_limit``. The plans to start from are tried in any case.

    Returns:
        The plan; its loss is never above that of the knapsack's plan, and it never exceeds the budget.

    Raises:
        RegroupError: as ``budget.allocate``.
    """
    choices = [sorted(cost) for cost in costs]
    search = _Search(choices, units, budget, losses, trial_limit(choices) if limit is None else limit)
    start = tuple(allocate(costs, units, budget))
    search.try_all([start, *search.uniform()], counted=False)
    search.try_all(search.from_the_smallest(costs))
    settled = False
    while not settled and search.left > 0:
        before = search.best
        settled = search.improve()
        if search.best == before:
            break
    return Refined(search.best, search.known[search.best], start, search.known[start], len(search.known), settled)


class _Search:
    """The plans that were tried, and their losses.

    Attributes:
        known: losses by plan, also of plans above the budget, which only tell what a change gains.
        best: of the plans within the budget.
    """

    def __init__(
        self,
        choices: list[list[int]],
        units: Sequence[Mapping[int, int]],
        budget: int,
        losses: Callable[[list[Heads]], list[float]],
        limit: int,
    ) -> None:
        self.choices, self.units, self.budget, self.losses, self.limit = choices, units, budget, losses, limit
        self.known: dict[Heads, float] = {}
        self.best: Heads = ()

    @property
    def left(self) -> int:
        """How many plans may still be tried."""
        return self.limit - len(self.known)

    def fits(self, heads: Heads) -> bool:
        return sum(unit[number] for unit, number in zip(self.units, heads, strict=True)) <= self.budget

    def try_all(self, plans: Sequence[Heads], *, counted: bool = True) -> None:
        """Measure those that are not known, as many as may be tried, and keep the best that fits."""
        new = [heads for heads in dict.fromkeys(plans) if heads not in self.known]
        new = new[: max(0, self.left)] if counted else new
        for heads, loss in zip(new, self.losses(new) if new else [], strict=True):
            self.known[heads] = loss
            better = not self.best or loss < self.known[self.best] * (1 - _GAIN)
            if better and self.fits(heads):
                self.best = heads

    def uniform(self) -> list[Heads]:
        """The largest number that all layers may have within the budget, if there is one."""
        common = set.intersection(*map(set, self.choices))
        fitting = [heads for number in sorted(common) if self.fits(heads := (number,) * len(self.choices))]
        return fitting[-1:]

    def from_the_smallest(self, costs: Sequence[Mapping[int, float]]) -> list[Heads]:
        """The knapsack's plans for what it gains to keep each layer in the smallest model, and for both kinds of costs.

        The cost of a layer alone neglects what the other layers break; the gain in the smallest model overrates it.
        """
        least = tuple(numbers[0] for numbers in self.choices)
        gains = self._gains(least)
        if gains is None:
            return []
        # Both are 0 at the largest number of a layer.
        kept = [{number: value - gain[max(gain)] for number, value in gain.items()} for gain in gains]
        mean = [{n: (one[n] + two[n]) / 2 for n in two} for one, two in zip(costs, kept, strict=True)]
        return [tuple(allocate(each, self.units, self.budget)) for each in (kept, mean)]

    def improve(self) -> bool:
        """Move to a better plan, if one is found; or say that all moves were tried and none gains."""
        before = self.best
        gains = self._gains(before)
        if gains is None or self.best != before:
            return False
        self.try_all([tuple(allocate(gains, self.units, self.budget))])
        exchanges = sorted(self._exchanges(before, gains), key=lambda pair: pair[0])
        plans = [heads for _, heads in exchanges if heads not in self.known]
        for start in range(0, len(plans), _BATCH):
            if self.best != before or self.left <= 0 or start >= _BATCH * _PATIENCE:
                return False
            self.try_all(plans[start : start + _BATCH])
        return self.best == before and all(heads in self.known for heads in plans)

    def _gains(self, around: Heads) -> Costs | None:
        """What changing each layer alone does to the loss of a plan; None where that takes too many trials."""
        changes = [
            (place, number)
            for place, numbers in enumerate(self.choices)
            for number in numbers
            if number != around[place]
        ]
        plans = [_changed(around, place, number) for place, number in changes]
        if sum(heads not in self.known for heads in (around, *plans)) > self.left:
            return None
        self.try_all([around, *plans])
        gains: Costs = [{number: 0.0} for number in around]
        for (place, number), heads in zip(changes, plans, strict=True):
            gains[place][number] = self.known[heads] - self.known[around]
        return gains

    def _exchanges(self, heads: Heads, gains: Costs) -> Iterator[tuple[float, Heads]]:
        """Every plan within the budget that gives one layer more and another one less, and what it should gain."""
        for up, more in enumerate(gains):
            for down, fewer in enumerate(gains):
                for high in more if up != down else ():
                    for low in fewer if high > heads[up] else ():
                        made = _changed(_changed(heads, up, high), down, low)
                        if low < heads[down] and self.fits(made):
                            yield more[high] + fewer[low], made


def _changed(heads: Heads, place: int, number: int) -> Heads:
    return (*heads[:place], number, *heads[place + 1 :])
