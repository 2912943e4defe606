"""Which heads form groups: a search over partitions into sets of equal size.

Units are the original KV heads, numbered from 0. The caller says what a group costs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, combinations

from ..errors import RegroupError

Groups = list[tuple[int, ...]]

# A cost must be lower by more than this share to count as lower, so that rounding decides nothing.
TOLERANCE = 1e-9
# Local optima of the surrogate that the true cost judges.
JUDGED = 4
# True costs of groups that the last refinement may ask for.
REFINEMENT = 64


def search_groups(
    cost: Callable[[tuple[int, ...]], float],
    pair_cost: Sequence[Sequence[float]],
    units: int,
    groups: int,
    *,
    starts: int = 8,
    exact_limit: int = 1000,
    seed: int = 0,
) -> Groups:
    """Divide units into groups of equal size, so that the groups' costs add up to little.

    Few partitions are all tried. Of many, the sum of ``pair_cost`` within groups stands for the cost: swaps of two
    units lower it from several starts until none does (Kernighan and Lin, 1970, without their look-ahead), then the
    true cost chooses among the best results and neighbouring groups, and refines its choice by a few more swaps.

    Args:
        cost: of one group, its units in ascending order. It is asked once at most for the same units.
        pair_cost: symmetric table, (units, units), finite; the diagonal does not count.
        units: how many there are.
        groups: how many sets; divides ``units``.
        starts: of the search by swaps: neighbouring groups, groups grown from the cheapest pairs, and random ones.
        exact_limit: the largest number of partitions that is enumerated.
        seed: of the random starts.

    Returns:
        The groups by their first unit, the units of each in ascending order. Never more costly than neighbouring
        groups, which are kept unless something is lower.

    Raises:
        RegroupError: the units cannot be divided into that many groups, or a pair cost is not finite.
    """
    if groups < 1 or units % groups:
        raise RegroupError(
            "the KV heads cannot be divided into groups of equal size",
            expected=f"a divisor of {units}",
            got=groups,
            remedy=f"choose one of {', '.join(str(d) for d in range(1, units + 1) if units % d == 0)}",
        )
    size = units // groups
    ways = math.factorial(units) // (math.factorial(size) ** groups * math.factorial(groups))
    judge = _Judge(cost)
    contiguous = _cut(range(units), groups)
    if ways == 1:
        return contiguous
    if ways <= exact_limit:
        # The first one is contiguous.
        return judge.best(_partitions(tuple(range(units)), size))
    pairs = _table(pair_cost, units)
    optima = {tuple(_climb(start, pairs)) for start in _starts(pairs, units, groups, starts, random.Random(seed))}
    ranked = sorted(optima, key=lambda found: (_surrogate(found, pairs), found))
    chosen = judge.best([contiguous, *map(list, ranked[:JUDGED])])
    return _refine(chosen, pairs, judge)


def query_order(groups: Sequence[Sequence[int]], queries_per_unit: int) -> tuple[int, ...] | None:
    """The original query heads, ordered so that the heads of a group are neighbours.

    Args:
        groups: KV heads of each group.
        queries_per_unit: query heads that share an original KV head.

    Returns:
        For ``LayerPlan.query_order``: None where the order stays as it is.
    """
    n = queries_per_unit
    order = tuple(head for unit in chain(*groups) for head in range(unit * n, (unit + 1) * n))
    return None if order == tuple(range(len(order))) else order


class _Judge:
    """The true cost, which is expensive: remembered by group."""

    def __init__(self, cost: Callable[[tuple[int, ...]], float]) -> None:
        self.cost = cost
        self.known: dict[tuple[int, ...], float] = {}

    def total(self, groups: Groups) -> float:
        for members in groups:
            if members not in self.known:
                self.known[members] = float(self.cost(members))
        return sum(self.known[members] for members in groups)

    def lower(self, groups: Groups, than: Groups) -> bool:
        """Whether one partition costs less than another; a cost that is not a number is never lower."""
        new, old = self.total(groups), self.total(than)
        return new < (old - TOLERANCE * abs(old) if math.isfinite(old) else old)

    def best(self, candidates: Sequence[Groups] | Iterator[Groups]) -> Groups:
        """The cheapest; of equal ones the first."""
        found: Groups | None = None
        for groups in candidates:
            if found is None or self.lower(groups, than=found):
                found = groups
        assert found is not None
        return found


def _canonical(groups: Sequence[Sequence[int]]) -> Groups:
    return sorted(tuple(sorted(members)) for members in groups)


def _cut(order: Sequence[int], groups: int) -> Groups:
    size = len(order) // groups
    return _canonical([order[g * size : (g + 1) * size] for g in range(groups)])


def _partitions(units: tuple[int, ...], size: int) -> Iterator[Groups]:
    """Every partition into sets of that size, in lexicographic order."""
    if not units:
        yield []
        return
    for others in combinations(units[1:], size - 1):
        taken = set(others)
        rest = tuple(unit for unit in units[1:] if unit not in taken)
        for tail in _partitions(rest, size):
            yield [(units[0], *others), *tail]


def _table(pair_cost: Sequence[Sequence[float]], units: int) -> list[list[float]]:
    """The pair costs as plain numbers, symmetric to the last bit, with nothing on the diagonal."""
    raw = [[float(pair_cost[i][j]) for j in range(units)] for i in range(units)]
    table = [[0.0 if i == j else (raw[i][j] + raw[j][i]) / 2 for j in range(units)] for i in range(units)]
    for i, j in combinations(range(units), 2):
        if not math.isfinite(table[i][j]):
            raise RegroupError(
                "what two heads cost together is not a finite number",
                expected="finite costs",
                got=f"heads {i} and {j}: {table[i][j]}",
                remedy="look for NaN or infinity in the weights, or in what was measured on text",
            )
    return table


def _surrogate(groups: Sequence[Sequence[int]], pairs: list[list[float]]) -> float:
    return math.fsum(pairs[i][j] for members in groups for i, j in combinations(members, 2))


def _starts(pairs: list[list[float]], units: int, groups: int, starts: int, chance: random.Random) -> Iterator[Groups]:
    yield _cut(range(units), groups)
    if starts > 1:
        yield _grow(pairs, units, groups)
    for _ in range(starts - 2):
        order = list(range(units))
        chance.shuffle(order)
        yield _cut(order, groups)


def _grow(pairs: list[list[float]], units: int, groups: int) -> Groups:
    """One group after the other: the cheapest pair that is left, then whichever unit adds least."""
    free = list(range(units))
    grown: list[list[int]] = []
    for _ in range(groups):
        members = list(min(combinations(free, 2), key=lambda pair: pairs[pair[0]][pair[1]]))
        free = [unit for unit in free if unit not in members]
        while len(members) < units // groups:
            cheapest = min(free, key=lambda unit: sum(pairs[unit][member] for member in members))
            members.append(cheapest)
            free.remove(cheapest)
        grown.append(members)
    return _canonical(grown)


def _swaps(groups: Groups, pairs: list[list[float]]) -> Iterator[tuple[float, int, int]]:
    """Each swap of units of two groups, after what it adds to the surrogate."""
    place = {unit: g for g, members in enumerate(groups) for unit in members}
    # What each unit costs together with the members of each group, from which each swap takes five numbers.
    pull = [[sum(row[member] for member in members) for members in groups] for row in pairs]
    for a, (pull_a, pairs_a) in enumerate(zip(pull, pairs, strict=True)):
        at_a = place[a]
        for b in range(a + 1, len(pairs)):
            at_b, pull_b = place[b], pull[b]
            if at_a != at_b:
                # The pull of the other's group counts the other, which will be gone.
                yield pull_a[at_b] - pull_a[at_a] + pull_b[at_a] - pull_b[at_b] - 2 * pairs_a[b], a, b


def _swapped(groups: Groups, a: int, b: int) -> Groups:
    other = {a: b, b: a}
    return _canonical([[other.get(unit, unit) for unit in members] for members in groups])


def _climb(groups: Groups, pairs: list[list[float]]) -> Groups:
    """Make the swap that lowers the surrogate most, until none lowers it."""
    # Rounding of the sums is below this and cannot keep the search going.
    least = 1e-12 * max(abs(value) for row in pairs for value in row)
    while True:
        delta, a, b = min(_swaps(groups, pairs))
        if delta >= -least:
            return groups
        groups = _swapped(groups, a, b)


def _refine(groups: Groups, pairs: list[list[float]], judge: _Judge) -> Groups:
    """Try swaps on the true cost, in the order of the surrogate cost, until the budget is spent."""
    limit = len(judge.known) + REFINEMENT
    lowered = True
    while lowered:
        lowered = False
        for _, a, b in sorted(_swaps(groups, pairs)):
            tried = _swapped(groups, a, b)
            if len(judge.known) + sum(members not in judge.known for members in tried) > limit:
                continue
            if judge.lower(tried, than=groups):
                groups, lowered = tried, True
                break
    return groups
