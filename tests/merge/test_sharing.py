"""The objective against sums over samples, and what holds for every rule."""

from __future__ import annotations

from math import isfinite

import pytest
import torch
from groups import OWNERS, RULES, Group, awkward, draw, normal
from hypothesis import given, settings
from hypothesis import strategies as st

from regroup.merge.lowrank import low_rank
from regroup.merge.procrustes import procrustes
from regroup.merge.sharing import Sharing, best_restore, error, gaps, owners, pooled

DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def anything(owner: list[int], D: int, seed: int) -> Sharing:
    new = normal(seed)
    return Sharing(new(D, (max(owner) + 1) * D), new(len(owner), D, D))


def test_owners_are_counted_in_the_order_of_the_query_heads() -> None:
    assert owners([3, 3, 5]) == ([3, 5], [0, 0, 1])
    assert owners([5, 3, 5, 1]) == ([5, 3, 1], [0, 1, 0, 2])
    assert owners([2]) == ([2], [0])


@pytest.mark.parametrize("own_metrics", [False, True])
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_error_of_values_is_what_the_outputs_lose(owner: list[int], own_metrics: bool) -> None:
    D, hidden = 3, 7
    group, sharing = draw(owner, D, hidden, 0, own_metrics=own_metrics), anything(owner, D, 1)
    total = 0.0
    for h, head in enumerate(owner):
        for s, x in enumerate(group.inputs):
            value = group.weight[head * D : (head + 1) * D] @ x
            shared = sharing.reduce @ group.weight @ x
            lost = group.outputs[h] @ value - group.outputs[h] @ sharing.restore[h] @ shared
            total += float(lost @ lost) * (1.0 if group.mass is None else float(group.mass[h, s]))
    total /= len(group.inputs)
    assert error(sharing, group.grams, group.moments, owner) == pytest.approx(total, rel=1e-9)
    assert float(group.measure(sharing.reduce, sharing.restore)) == pytest.approx(total, rel=1e-9)
    turned = Sharing(sharing.reduce, sharing.restore.roll(1, 0))
    assert error(turned, group.grams, group.moments, owner) != pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_error_of_keys_is_that_of_the_scores_of_unrelated_queries(owner: list[int]) -> None:
    """With biases, as a last column for an input of one."""
    D, hidden, new = 3, 5, normal(2)
    weight, sharing = new((max(owner) + 1) * D, hidden + 1), anything(owner, D, 3)
    inputs = torch.cat([new(11, hidden), torch.ones(11, 1, dtype=torch.float64)], dim=1)
    queries = new(len(owner), 9, D) + new(len(owner), 1, D)
    keys = inputs @ weight.T
    total = 0.0
    for h, head in enumerate(owner):
        for q in queries[h]:
            for k in keys:
                before = q @ k[head * D : (head + 1) * D]
                after = (sharing.restore[h].T @ q) @ (sharing.reduce @ k)
                total += float((before - after) ** 2)
    total /= 9 * 11
    grams, moments = queries.mT @ queries / 9, keys.T @ keys / 11
    assert error(sharing, grams, moments, owner) == pytest.approx(total, rel=1e-9)
    centred = torch.stack([query.T.cov(correction=0) for query in queries])
    assert error(sharing, centred, moments, owner) != pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_gaps_are_what_the_shared_head_misses(owner: list[int]) -> None:
    group, sharing = draw(owner, 4, 6, 4), anything(owner, 4, 5)
    missed = gaps(sharing, owner) @ group.weight
    torch.testing.assert_close(missed, group.own - sharing.restore @ (sharing.reduce @ group.weight))


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_pooling_is_the_mean_over_query_heads(owner: list[int]) -> None:
    group = draw(owner, 4, 6, 6)
    sharing = pooled(len(owner), max(owner) + 1, 4, owner)
    torch.testing.assert_close(sharing.reduce @ group.weight, group.own.mean(0))
    assert torch.equal(sharing.restore, torch.eye(4, dtype=torch.float64).expand(len(owner), 4, 4))


@pytest.mark.parametrize("own_metrics", [False, True])
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_best_restore_is_a_regression_of_each_head_on_the_shared_one(owner: list[int], own_metrics: bool) -> None:
    group, new = draw(owner, 3, 8, 7, own_metrics=own_metrics), normal(8)
    reduce = new(3, len(group.weight))
    restore = best_restore(reduce, group.moments, owner)
    shared = group.inputs @ (reduce @ group.weight).T
    for h in range(len(owner)):
        root = torch.ones(40, 1, dtype=torch.float64) if group.mass is None else group.mass[h, :, None].sqrt()
        solution = torch.linalg.lstsq(root * shared, root * (group.inputs @ group.own[h].T)).solution
        torch.testing.assert_close(restore[h], solution.T, atol=1e-9, rtol=1e-9)

    # Whatever the heads are read through, no change helps.
    for grams in (group.grams, torch.eye(3).expand(len(owner), 3, 3), normal(9)(len(owner), 1, 3).mT.square()):
        grams = grams.double() @ grams.double().mT
        least = error(Sharing(reduce, restore), grams, group.moments, owner)
        for _ in range(10):
            for size in (1e-4, 1e-2, 1.0):
                other = Sharing(reduce, restore + size * new(*restore.shape))
                assert error(other, grams, group.moments, owner) > least
    identity = Sharing(reduce, torch.eye(3, dtype=torch.float64).expand_as(restore))
    best = error(Sharing(reduce, restore), group.grams, group.moments, owner)
    assert error(identity, group.grams, group.moments, owner) > 1.1 * best


def test_the_best_restore_of_a_shared_head_with_equal_rows_is_the_smallest() -> None:
    group, new = draw([0, 1], 3, 8, 10), normal(11)
    row = new(1, 6)
    restore = best_restore(row.expand(3, 6), group.moments, [0, 1])
    alone = best_restore(torch.cat([row, row.new_zeros(2, 6)]), group.moments, [0, 1])
    torch.testing.assert_close(restore, alone[..., :1].expand(2, 3, 3) / 3)
    assert not best_restore(row.new_zeros(3, 6), group.moments, [0, 1]).any()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_query_heads_of_one_kv_head_keep_it_bit_for_bit(rule: str, n: int) -> None:
    new = normal(12)
    weight, outputs = new(5, 8), new(n, 2, 5)
    for moments in (weight @ weight.T, weight[:, :2] @ weight[:, :2].T, weight.new_zeros(5, 5)):
        sharing = RULES[rule](outputs.mT @ outputs, moments, [0] * n)
        assert torch.equal(sharing.reduce, torch.eye(5, dtype=torch.float64))
        assert torch.equal(sharing.restore, torch.eye(5, dtype=torch.float64).expand(n, 5, 5))
        assert torch.equal(sharing.reduce @ weight, weight)
        assert error(sharing, outputs.mT @ outputs, moments, [0] * n) == 0
    # Another KV head, and it is not kept.
    two = draw([0] * n + [1], 5, 8, 13)
    sharing = RULES[rule](two.grams, two.moments, two.owner)
    assert error(sharing, two.grams, two.moments, two.owner) > 1e-3 * two.energy()


def test_metrics_of_their_own_keep_one_kv_head_bit_for_bit() -> None:
    group = draw([0, 0, 0], 4, 6, 14, own_metrics=True)
    for rule in (low_rank, procrustes):
        sharing = rule(group.grams, group.moments, group.owner)
        assert torch.equal(sharing.reduce, torch.eye(4, dtype=torch.float64))
        assert torch.equal(sharing.restore, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_same_inputs_give_the_same_bits(rule: str, owner: list[int]) -> None:
    group = draw(owner, 4, 6, 15)
    grams, moments = group.grams, group.moments
    kept = grams.clone(), moments.clone()
    once = RULES[rule](grams, moments, owner)
    strided = grams.mT.contiguous().mT, moments.repeat(1, 2)[:, : len(moments)]
    for again in (RULES[rule](grams, moments, tuple(owner)), RULES[rule](*strided, owner)):
        assert torch.equal(once.reduce, again.reduce)
        assert torch.equal(once.restore, again.restore)
    assert torch.equal(grams, kept[0])
    assert torch.equal(moments, kept[1])
    assert (once.reduce.dtype, once.restore.dtype) == (torch.float64, torch.float64)
    assert (once.reduce.shape, once.restore.shape) == ((4, len(moments)), (len(owner), 4, 4))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_computed_in_float64(rule: str, dtype: torch.dtype) -> None:
    group = draw([0, 1, 1], 4, 6, 16)
    grams, moments = group.grams.to(dtype), group.moments.to(dtype)
    narrow, wide = RULES[rule](grams, moments, group.owner), RULES[rule](grams.double(), moments.double(), group.owner)
    assert torch.equal(narrow.reduce, wide.reduce)
    assert torch.equal(narrow.restore, wide.restore)
    assert error(narrow, grams, moments, group.owner) == error(wide, grams.double(), moments.double(), group.owner)


@settings(deadline=None, max_examples=60)
@given(group=awkward(), dtype=st.sampled_from(DTYPES))
def test_nothing_awkward_breaks_a_rule(group: Group, dtype: torch.dtype) -> None:
    grams, moments = group.grams.to(dtype), group.moments.to(dtype)
    n, D = grams.shape[:2]
    each = moments.expand(n, -1, -1) * torch.arange(n)[:, None, None]
    sharings = [rule(grams, moments, group.owner) for rule in RULES.values()]
    for sharing in [*sharings, low_rank(grams, each, group.owner), procrustes(grams, each, group.owner)]:
        assert (sharing.reduce.shape, sharing.restore.shape) == ((D, len(moments)), (n, D, D))
        assert sharing.reduce.isfinite().all()
        assert sharing.restore.isfinite().all()
        assert isfinite(error(sharing, grams, moments, group.owner))
