"""Alignment by rotations: what it recovers, what it cannot, and that it is aligned."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from groups import OWNERS, Group, awkward, draw, normal, orthogonal, related
from hypothesis import given, settings
from torch import Tensor

from regroup.merge.procrustes import procrustes
from regroup.merge.sharing import Sharing, error, pooled


def spread(sharing: Sharing, moments: Tensor, owner: list[int]) -> float:
    """Gower's objective: the mean square distance of all heads, turned back, from their mean."""
    D = len(sharing.reduce)
    total = 0.0
    for turn, place in zip(sharing.restore, owner, strict=True):
        gap = -sharing.reduce.clone()
        gap[:, place * D : (place + 1) * D] += turn.T
        total += float(torch.trace(gap @ moments @ gap.T))
    return total


def turned(turns: Tensor, owner: list[int]) -> Sharing:
    """The mean over query heads of heads turned back by turns (m, D, D)."""
    weights = torch.bincount(torch.tensor(owner)).double() / len(owner)
    return Sharing((weights[:, None, None] * turns.mT).transpose(0, 1).reshape(turns.shape[1], -1), turns[owner])


@pytest.mark.parametrize("owner", OWNERS, ids=str)
@pytest.mark.parametrize("D", [1, 2, 5])
def test_rotated_heads_are_one_head(D: int, owner: list[int]) -> None:
    group = related(orthogonal(max(owner) + 1, D, 0), 1, owner)
    sharing = procrustes(group.grams, group.moments, owner)
    assert error(sharing, group.grams, group.moments, owner) < 1e-9 * group.energy()
    assert float(group.measure(sharing.reduce, sharing.restore)) < 1e-9 * group.energy()
    if D > 1:
        mean = pooled(len(owner), max(owner) + 1, D, owner)
        assert error(mean, group.grams, group.moments, owner) > 0.02 * group.energy()
    # Heads behind maps that are not rotations are not.
    group = related(normal(2)(max(owner) + 1, D, D), 3, owner)
    sharing = procrustes(group.grams, group.moments, owner)
    assert error(sharing, group.grams, group.moments, owner) > 1e-2 * group.energy()


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_heads_of_low_rank_are_recovered_too(owner: list[int]) -> None:
    group = related(orthogonal(max(owner) + 1, 5, 4), 5, owner)
    few = group.inputs[:2] @ group.weight.T
    sharing = procrustes(group.grams, few.T @ few, owner)
    total = error(turned(torch.zeros(max(owner) + 1, 5, 5).double(), owner), group.grams, few.T @ few, owner)
    assert error(sharing, group.grams, few.T @ few, owner) < 1e-9 * total


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_heads_are_turned_and_averaged_over_query_heads(owner: list[int]) -> None:
    group = draw(owner, 4, 12, 6)
    sharing = procrustes(group.grams, group.moments, owner)
    eye = torch.eye(4, dtype=torch.float64)
    torch.testing.assert_close(sharing.restore @ sharing.restore.mT, eye.expand_as(sharing.restore))
    turns = torch.stack([sharing.restore[owner.index(head)] for head in range(max(owner) + 1)])
    assert torch.equal(sharing.restore, turns[owner])
    torch.testing.assert_close(sharing.reduce, turned(turns, owner).reduce)
    other = procrustes(group.grams * torch.rand(4, 4), group.moments, owner)  # only their shape is used
    assert torch.equal(sharing.reduce, other.reduce)
    each = group.moments * torch.tensor([0.5, 1.5]).repeat(8)[: len(owner)].double()[:, None, None]
    if len(owner) % 2 == 0:  # the mean of metrics of their own
        torch.testing.assert_close(procrustes(group.grams, each, owner).reduce, sharing.reduce)


@pytest.mark.parametrize("owner", [[0, 1], [0, 0, 1], [0, 1, 1, 1]], ids=str)
def test_two_heads_are_aligned_as_well_as_they_can_be(owner: list[int]) -> None:
    """The nuclear norm of their cross moment is what rotations can reach: Schönemann 1966."""
    for D in (1, 2, 5):
        group = draw(owner, D, 12, 7)
        K = group.moments
        sharing = procrustes(group.grams, K, owner)
        p = owner.count(0) / len(owner)
        own = p * K[:D, :D].trace() + (1 - p) * K[D:, D:].trace()
        mean = p**2 * K[:D, :D].trace() + (1 - p) ** 2 * K[D:, D:].trace()
        mean += 2 * p * (1 - p) * torch.linalg.svdvals(K[:D, D:]).sum()
        assert spread(sharing, K, owner) / len(owner) == pytest.approx(float(own - mean), rel=1e-6)
        if D > 1:
            assert spread(pooled(len(owner), 2, D, owner), K, owner) / len(owner) > 1.01 * float(own - mean)


@pytest.mark.parametrize("owner", [[0, 1, 2], [0, 0, 1, 2], [0, 1, 2, 3]], ids=str)
def test_no_small_turn_aligns_more_heads_better(owner: list[int]) -> None:
    group, new = draw(owner, 4, 12, 8), normal(9)
    K, m = group.moments, max(owner) + 1
    settled = procrustes(group.grams, K, owner, rounds=2000)
    turns = torch.stack([settled.restore[owner.index(head)] for head in range(m)])
    least = spread(settled, K, owner)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            skew = new(m, 4, 4)
            nearby = turns @ torch.linalg.matrix_exp(size * (skew - skew.mT))
            assert spread(turned(nearby, owner), K, owner) > least
    assert spread(procrustes(group.grams, K, owner), K, owner) <= least * (1 + 1e-6)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
@pytest.mark.parametrize("D", [1, 2, 5])
def test_rotations_and_reflections_are_found_in_noise(D: int, owner: list[int]) -> None:
    m = max(owner) + 1
    for seed in range(6):
        turns, group = orthogonal(m, D, seed), draw(owner, D, 3 * D, seed)
        heads = group.inputs @ (group.weight + related(turns, seed + 50, owner).weight).T
        K = heads.T @ heads
        assert spread(procrustes(group.grams, K, owner), K, owner) <= spread(turned(turns, owner), K, owner)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
@pytest.mark.parametrize("D", [1, 2, 3])
def test_no_head_alone_is_aligned_better_by_any_turn(D: int, owner: list[int]) -> None:
    """Reflections included, which no sequence of small turns reaches."""
    for seed in range(4):
        group = draw(owner, D, 4, seed)
        settled = procrustes(group.grams, group.moments, owner, rounds=500)
        least = spread(settled, group.moments, owner)
        for head in range(max(owner) + 1):
            for turn in orthogonal(6, D, seed) * torch.tensor([1, -1]).repeat(3)[:, None, None]:
                turns = torch.stack([settled.restore[owner.index(each)] for each in range(max(owner) + 1)])
                turns[head] = turn
                assert spread(turned(turns, owner), group.moments, owner) >= least * (1 - 1e-9)


@settings(deadline=None, max_examples=40)
@given(group=awkward())
def test_every_round_aligns_better(group: Group) -> None:
    owner, K = group.owner, group.moments
    errors = [spread(procrustes(group.grams, K, owner, rounds=rounds), K, owner) for rounds in (0, 1, 2, 5, 50)]
    slack = 1e-9 * float(K.trace())
    assert all(after <= before + slack for before, after in pairwise(errors))
