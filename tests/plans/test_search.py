"""The search for groups, against enumeration, planted groups and its own promises."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regroup import RegroupError
from regroup.plans import group_members, key_value_sources, query_order, search_groups
from regroup.plans.search import REFINEMENT, Groups

Points = Sequence[Sequence[float]]


def contiguous(units: int, groups: int) -> Groups:
    size = units // groups
    return [tuple(range(g * size, (g + 1) * size)) for g in range(groups)]


def distances(points: Points) -> list[list[float]]:
    return [[math.dist(a, b) ** 2 for b in points] for a in points]


class Scatter:
    """Squared distances to the mean of a group, with every call written down."""

    def __init__(self, points: Points) -> None:
        self.points = points
        self.calls: list[tuple[int, ...]] = []

    def __call__(self, members: tuple[int, ...]) -> float:
        self.calls.append(members)
        return self.of(members)

    def of(self, members: Sequence[int]) -> float:
        chosen = [self.points[unit] for unit in members]
        mean = [math.fsum(column) / len(chosen) for column in zip(*chosen, strict=True)]
        return math.fsum(math.dist(point, mean) ** 2 for point in chosen)

    def total(self, groups: Groups) -> float:
        return math.fsum(self.of(members) for members in groups)


def planted(units: int, groups: int, seed: int, noise: float = 0.1) -> tuple[Scatter, Groups]:
    """Points around far centres, and which of them belong together."""
    chance = random.Random(seed)
    label = [unit % groups for unit in range(units)]
    chance.shuffle(label)
    centres = [[chance.gauss(0, 5) for _ in range(4)] for _ in range(groups)]
    points = [[x + chance.gauss(0, noise) for x in centres[own]] for own in label]
    hidden = sorted(tuple(u for u in range(units) if label[u] == g) for g in range(groups))
    return Scatter(points), hidden


def every_partition(units: int, groups: int) -> Iterator[Groups]:
    """By permutations: slow, and not as the search does it."""
    size = units // groups
    found = {
        tuple(sorted(tuple(sorted(order[g * size : (g + 1) * size])) for g in range(groups)))
        for order in permutations(range(units))
    }
    yield from map(list, sorted(found))


@pytest.mark.parametrize(
    ("units", "groups"), [(1, 1), (2, 1), (3, 3), (4, 2), (6, 2), (6, 3), (6, 1), (6, 6), (8, 4), (8, 2)]
)
def test_few_partitions_are_all_tried(units: int, groups: int) -> None:
    for seed in range(3):
        chance = random.Random(seed)
        price: dict[tuple[int, ...], float] = {}

        def cost(members: tuple[int, ...], price: dict = price, chance: random.Random = chance) -> float:
            assert members not in price
            return price.setdefault(members, chance.uniform(-1, 1))

        # A table that says nothing: only enumeration can find what has no structure.
        found = search_groups(cost, [[0.0] * units] * units, units, groups)
        if groups in (1, units):
            assert not price
            assert found == contiguous(units, groups)
            continue
        best = min(every_partition(units, groups), key=lambda way: sum(price[members] for members in way))
        assert found == best


def test_enumeration_stops_at_its_limit() -> None:
    """Nine units make 280 partitions into threes, of 84 groups; the heuristic never asks for that many."""
    scatter, hidden = planted(9, 3, 0)
    for limit, every in ((280, True), (279, False)):
        scatter.calls.clear()
        assert search_groups(scatter, distances(scatter.points), 9, 3, exact_limit=limit) == hidden
        assert (len(scatter.calls) == 84) is every


@pytest.mark.parametrize(("units", "groups"), [(12, 6), (16, 2), (16, 4), (16, 8), (32, 4), (32, 8), (32, 16)])
def test_planted_groups_are_found(units: int, groups: int) -> None:
    for seed in range(3):
        scatter, hidden = planted(units, groups, seed)
        found = search_groups(scatter, distances(scatter.points), units, groups)
        assert found == hidden
        order = list(range(units))
        random.Random(seed).shuffle(order)
        assert scatter.total(sorted(map(tuple, group_members(order, groups)))) > 10 * scatter.total(found)
        assert scatter.total(contiguous(units, groups)) > 10 * scatter.total(found)


def test_one_climb_is_not_always_enough() -> None:
    """More starts find more, which is what they are for."""
    worse = 0
    for seed in range(20):
        scatter, _ = planted(16, 4, seed, noise=6.0)
        table = distances(scatter.points)
        one, many = (search_groups(scatter.of, table, 16, 4, starts=starts) for starts in (1, 12))
        worse += scatter.total(one) > scatter.total(many) * (1 + 1e-9)
        assert scatter.total(many) <= scatter.total(one) * (1 + 1e-9)
    assert worse


COSTS = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(-1e6, 1e6), st.floats(0, 1e-9))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_never_worse_than_neighbouring_groups(data: st.DataObject) -> None:
    """Whatever the table says, even if it has nothing to do with the cost."""
    units, groups = data.draw(st.sampled_from([(4, 2), (6, 2), (8, 4), (9, 3), (10, 5), (12, 4), (12, 3)]))
    table = [[0.0] * units for _ in range(units)]
    for a in range(units):
        for b in range(a):
            table[a][b] = table[b][a] = data.draw(COSTS)
    salt, coarse = data.draw(st.integers(0, 999)), data.draw(st.booleans())

    def cost(members: tuple[int, ...]) -> float:
        value = random.Random(hash((salt, members))).uniform(-1, 1)
        return float(round(value)) if coarse else value

    found = search_groups(cost, table, units, groups, exact_limit=data.draw(st.sampled_from([0, 300])))
    assert sorted(unit for members in found for unit in members) == list(range(units))
    assert all(len(members) == units // groups and list(members) == sorted(members) for members in found)
    assert found == sorted(found)
    plain = contiguous(units, groups)
    if found != plain:
        assert sum(map(cost, found)) < sum(map(cost, plain))


@pytest.mark.parametrize("exact_limit", [0, 1000])
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, math.inf, math.nan])
def test_ties_keep_neighbouring_groups(value: float, exact_limit: int) -> None:
    chance = random.Random(0)
    table = [[0.0] * 8 for _ in range(8)]
    for a in range(8):
        for b in range(a):
            table[a][b] = table[b][a] = chance.random()
    assert search_groups(lambda _: value, table, 8, 4, exact_limit=exact_limit) == contiguous(8, 4)


def test_a_difference_of_rounding_is_a_tie() -> None:
    def cost(less: float) -> Callable[[tuple[int, ...]], float]:
        return lambda members: 1.0 - less * (members in ((0, 2), (1, 3)))

    table = [[0.0] * 4] * 4
    assert search_groups(cost(1e-12), table, 4, 2) == [(0, 1), (2, 3)]
    assert search_groups(cost(1e-6), table, 4, 2) == [(0, 2), (1, 3)]


def test_of_equal_partitions_the_first_in_order() -> None:
    price: dict[tuple[int, ...], float] = {(0, 1): 5.0, (2, 3): 5.0}
    assert search_groups(lambda members: price.get(members, 1.0), [[0.0] * 4] * 4, 4, 2) == [(0, 2), (1, 3)]


def test_the_seed_decides() -> None:
    scatter, _ = planted(24, 6, 5, noise=6.0)
    table = distances(scatter.points)
    runs = []
    for seed in (0, 0, 1):
        fresh = Scatter(scatter.points)
        runs.append((search_groups(fresh, table, 24, 6, seed=seed), fresh.calls))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


@pytest.mark.parametrize(("units", "groups"), [(8, 4), (12, 4), (24, 6)])
def test_no_group_is_judged_twice(units: int, groups: int) -> None:
    scatter, _ = planted(units, groups, 1, noise=6.0)
    search_groups(scatter, distances(scatter.points), units, groups)
    assert len(scatter.calls) == len(set(scatter.calls))
    if units > 8:
        assert len(scatter.calls) <= 5 * groups + REFINEMENT


def test_the_true_cost_has_the_last_word() -> None:
    """A table that mistakes two units is put right by the refinement, and believed where the cost agrees with it."""
    scatter, hidden = planted(16, 4, 3)
    table = distances(scatter.points)
    # Two units of different groups appear to belong rather to each other's.
    a, b = hidden[0][1], hidden[1][1]
    index = list(range(16))
    index[a], index[b] = b, a
    misled = [[0.45 * table[i][j] + 0.55 * table[index[i]][index[j]] for j in range(16)] for i in range(16)]
    wrong = sorted(tuple(sorted(index[unit] for unit in members)) for members in hidden)
    assert search_groups(lambda members: 1.0 - (members in wrong), misled, 16, 4) == wrong
    assert search_groups(scatter, misled, 16, 4) == hidden


@pytest.mark.parametrize("groups", [0, -1, 4, 12])
def test_groups_of_unequal_size(groups: int) -> None:
    with pytest.raises(RegroupError, match=r"equal size[\s\S]*divisor of 6[\s\S]*choose one of 1, 2, 3, 6$"):
        search_groups(lambda _: 0.0, [[0.0] * 6] * 6, 6, groups)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_tables_that_are_not_numbers(value: float) -> None:
    table = [[0.0] * 12 for _ in range(12)]
    table[3][7] = value
    with pytest.raises(RegroupError, match=r"finite[\s\S]*heads 3 and 7[\s\S]*remedy"):
        search_groups(lambda _: 0.0, table, 12, 4)
    table[3][7], table[5][5] = 0.0, value  # the diagonal does not count
    assert search_groups(lambda _: 0.0, table, 12, 4) == contiguous(12, 4)


def test_the_order_puts_groups_together() -> None:
    assert query_order([(0, 1), (2, 3)], 1) is None
    assert query_order([(0, 1), (2, 3)], 3) is None
    assert query_order([(0, 2), (1, 3)], 1) == (0, 2, 1, 3)
    order = query_order([(0, 2), (1, 3)], 2)
    assert order is not None
    assert order == (0, 1, 4, 5, 2, 3, 6, 7)
    assert key_value_sources(order, 4, 2) == [[0, 2], [1, 3]]
    assert key_value_sources(range(8), 4, 2) != [[0, 2], [1, 3]]
