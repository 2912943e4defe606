"""Low-rank sharing against descent, against a truncated SVD of samples, and where it must be exact."""

from __future__ import annotations

import pytest
import torch
from groups import OWNERS, Group, awkward, descend, draw, normal, orthogonal, related
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from regroup.merge.lowrank import low_rank
from regroup.merge.procrustes import procrustes
from regroup.merge.sharing import Sharing, best_restore, error, owners, pooled


def lost(group: Group, sharing: Sharing) -> float:
    return error(sharing, group.grams, group.moments, group.owner)


def mean(group: Group) -> Sharing:
    return pooled(len(group.owner), max(group.owner) + 1, group.grams.shape[-1], group.owner)


def least(group: Group) -> float:
    """What no shared head can avoid: the tail of the singular values of all outputs, head by head, sample by sample."""
    outputs = group.outputs @ group.own @ group.inputs.T
    D = group.outputs.shape[-1]
    return float(torch.linalg.svdvals(outputs.flatten(0, 1))[D:].square().sum()) / len(group.inputs)


def descents(group: Group, *starts: Sharing, random: int) -> list[float]:
    """Losses that descent over R and N reaches from the starts and from random ones, as shares of the energy."""
    (n, _, D), wide, energy = group.outputs.shape, len(group.weight), group.energy()
    new = normal(99)
    points = [(start.reduce, start.restore) for start in starts]
    points += [(new(D, wide) / wide, new(n, D, D)) for _ in range(random)]
    return [descend(lambda R, N: group.measure(R, N) / energy, *point) for point in points]


@pytest.mark.parametrize(
    ("owner", "D", "hidden"),
    [
        ([0, 1], 2, 6),
        ([0, 1], 6, 12),
        ([0, 0, 1], 3, 8),
        ([0, 1, 2], 2, 9),
        ([0, 1, 0, 2], 3, 12),
        ([0, 1, 2, 3], 4, 9),
    ],
    ids=str,
)
def test_descent_finds_nothing_better(owner: list[int], D: int, hidden: int) -> None:
    """Neither over R and N, from the rule, nor over any D numbers for each sample and any outputs of them."""
    group, new = draw(owner, D, hidden, 0), normal(98)
    rule, energy = low_rank(group.grams, group.moments, owner), group.energy()
    outputs = group.outputs @ group.own @ group.inputs.T
    samples = len(group.inputs)
    found = [
        descend(lambda M, S: (outputs - M @ S).square().sum() / samples / energy, new(*group.outputs.shape), start)
        for start in new(3, D, samples)
    ]
    share = lost(group, rule) / energy
    assert min(found + descents(group, rule, random=0)) > share * (1 - 1e-6)
    assert min(found) < share * (1 + 1e-6)
    for other in (mean(group), procrustes(group.grams, group.moments, owner)):
        assert min(found) < lost(group, other) / energy * 0.9


@pytest.mark.parametrize("D", [1, 2, 5])
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_error_is_the_tail_of_the_singular_values(owner: list[int], D: int) -> None:
    for hidden in (D + 1, 3 * D):
        group = draw(owner, D, hidden, 1)
        rule = low_rank(group.grams, group.moments, owner)
        assert lost(group, rule) == pytest.approx(least(group), rel=1e-9, abs=1e-12 * group.energy())
        assert float(group.measure(rule.reduce, rule.restore)) == pytest.approx(lost(group, rule), rel=1e-9)
        assert lost(group, mean(group)) > 1.1 * least(group)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
@pytest.mark.parametrize("D", [1, 2, 5])
def test_heads_behind_invertible_maps_are_one_head(D: int, owner: list[int]) -> None:
    maps = normal(2)(max(owner) + 1, D, D)
    group = related(maps, 3, owner)
    rule = low_rank(group.grams, group.moments, owner)
    assert lost(group, rule) < 1e-9 * group.energy()
    assert float(group.measure(rule.reduce, rule.restore)) < 1e-9 * group.energy()
    assert lost(group, mean(group)) > 1e-2 * group.energy()
    if D > 1:
        assert lost(group, procrustes(group.grams, group.moments, owner)) > 1e-2 * group.energy()
    # With one head of another kind, they are not.
    other = draw(owner, D, 3 * D, 4)
    assert lost(other, low_rank(other.grams, other.moments, owner)) > 1e-3 * other.energy()


@settings(deadline=None, max_examples=100)
@given(group=awkward())
def test_nothing_shared_is_better(group: Group) -> None:
    # Heads that are 1e12 times as large leave the rounding of their own sums.
    slack = 1e-9 * group.energy()
    rule = lost(group, low_rank(group.grams, group.moments, group.owner))
    assert rule == pytest.approx(least(group), abs=slack)
    assert rule <= lost(group, mean(group)) + slack
    assert rule <= lost(group, procrustes(group.grams, group.moments, group.owner)) + slack


@settings(deadline=None, max_examples=60)
@given(
    heads=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    D=st.integers(1, 5),
    rank=st.integers(1, 8),
    seed=st.integers(0, 2**32 - 1),
    powers=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
)
@example(heads=[0, 1], D=4, rank=2, seed=1, powers=(40, 40))
@example(heads=[0, 0, 1], D=5, rank=3, seed=0, powers=(-40, -40))
def test_the_scale_of_the_metric_changes_nothing(
    heads: list[int], D: int, rank: int, seed: int, powers: tuple[int, int]
) -> None:
    """Grams and moments of 1e-24 to 1e24, also with fewer directions than a head has dimensions."""
    owner = owners(heads)[1]
    group = draw(owner, D, rank, seed)
    gram, moment = 4.0 ** powers[0], 4.0 ** powers[1]
    scaled = low_rank(group.grams * gram, group.moments * moment, owner)
    assert lost(group, scaled) == pytest.approx(least(group), abs=1e-9 * group.energy())
    # Nor the shared head, but for what the inputs never excite.
    plain = low_rank(group.grams, group.moments, owner)
    shared = [group.inputs @ group.weight.T @ sharing.reduce.T for sharing in (plain, scaled)]
    before, after = (float(each.square().sum()) for each in shared)
    assert after == pytest.approx(before, rel=1e-6)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_order_and_the_basis_of_the_heads_change_nothing(owner: list[int]) -> None:
    group, m = draw(owner, 3, 12, 5), max(owner) + 1
    best = lost(group, low_rank(group.grams, group.moments, owner))
    backwards = Group(owner[::-1], group.weight, group.inputs, group.outputs.flip(0))
    assert lost(backwards, low_rank(backwards.grams, backwards.moments, backwards.owner)) == pytest.approx(best)
    maps = normal(6)(m, 3, 3)
    mixed = (maps @ group.weight.view(m, 3, -1)).reshape(m * 3, -1)
    other = Group(owner, mixed, group.inputs, group.outputs @ torch.linalg.inv(maps)[owner])
    assert lost(other, low_rank(other.grams, other.moments, owner)) == pytest.approx(best)
    assert lost(other, mean(other)) != pytest.approx(lost(group, mean(group)), rel=1e-2)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_shared_head_is_as_large_as_those_it_replaces(owner: list[int]) -> None:
    group = draw(owner, 4, 12, 7)
    shared = group.inputs @ (low_rank(group.grams, group.moments, owner).reduce @ group.weight).T
    power = float((group.inputs @ group.weight.T).square().mean())
    torch.testing.assert_close(shared.T @ shared / len(shared), power * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("owner", "D", "hidden"),
    [([0, 1], 2, 6), ([0, 0, 1], 3, 8), ([0, 1, 2], 3, 8), ([0, 0, 1, 1], 4, 12), ([0, 1, 2, 3], 2, 6)],
    ids=str,
)
def test_metrics_of_their_own_come_close_to_the_best_of_descents(owner: list[int], D: int, hidden: int) -> None:
    """Alternations end in a local optimum: of the starts that descent is given, none leads much further down."""
    group = draw(owner, D, hidden, 9, own_metrics=True)
    rule = low_rank(group.grams, group.moments, owner)
    share = lost(group, rule) / group.energy()
    best = min(descents(group, rule, random=2))
    assert best <= share <= best * 1.03
    # One metric for all, however well restored, does worse.
    common = low_rank(group.grams, group.moments.mean(0), owner)
    restored = Sharing(common.reduce, best_restore(common.reduce, group.moments, owner))
    assert share < lost(group, restored) / group.energy() < lost(group, common) / group.energy()
    assert lost(group, common) / group.energy() > best * 1.01


@settings(deadline=None, max_examples=40)
@given(
    heads=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    D=st.integers(1, 4),
    hidden=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    rounds=st.integers(0, 5),
)
def test_alternations_never_do_worse_than_one_metric(
    heads: list[int], D: int, hidden: int, seed: int, rounds: int
) -> None:
    owner = owners(heads)[1]
    group = draw(owner, D, hidden, seed, own_metrics=True)
    errors = [lost(group, low_rank(group.grams, group.moments.mean(0), owner))]
    errors += [lost(group, low_rank(group.grams, group.moments, owner, rounds=r)) for r in (rounds, rounds + 1)]
    assert errors[1] <= errors[0] + 1e-12 * group.energy()
    assert errors[2] <= errors[1] + 1e-12 * group.energy()


def test_equal_metrics_for_all_are_one_metric() -> None:
    group = draw([0, 1, 2], 3, 9, 9)
    each = group.moments.expand(3, 9, 9)
    alternated = low_rank(group.grams, each, group.owner)
    assert error(alternated, group.grams, each, group.owner) == pytest.approx(least(group), rel=1e-9)


def test_equal_heads_and_rotated_heads_lose_nothing_in_any_metric() -> None:
    for maps in (torch.eye(3, dtype=torch.float64).expand(3, 3, 3), orthogonal(3, 3, 10)):
        group = related(maps, 11)
        mass: Tensor = normal(12)(3, 40).exp()
        own = Group(group.owner, group.weight, group.inputs, group.outputs, mass)
        assert lost(own, low_rank(own.grams, own.moments, own.owner)) < 1e-9 * own.energy()
