"""Keys under RoPE: maps that commute with it, the best of them, and nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from groups import (
    OWNERS,
    PAIRS,
    Group,
    Pairs,
    awkward,
    circular,
    descend,
    draw,
    multiplications,
    normal,
    orthogonal,
    pairs_of,
    related,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regroup.merge.lowrank import low_rank
from regroup.merge.procrustes import procrustes
from regroup.merge.rotary import pair_indices, rotary_low_rank, rotary_procrustes
from regroup.merge.sharing import Sharing, error, owners, pooled

RULES = [rotary_low_rank, rotary_procrustes]
# Head dimension and how much of it RoPE rotates.
DIMS = [(2, 2), (6, 6), (6, 2), (7, 4), (5, 4)]


def rope(x: Tensor, position: Tensor, frequencies: Tensor, pairs: Pairs) -> Tensor:
    """Rotary embedding as Llama (half) and Cohere (interleaved) write it; x (…, D), position (…)."""
    dim = 2 * len(frequencies)
    x, rest = x[..., :dim], x[..., dim:]
    angles = position[..., None] * frequencies
    if pairs == "half":
        angles = torch.cat([angles, angles], dim=-1)
        other = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], dim=-1)
    else:
        angles = angles.repeat_interleave(2, dim=-1)
        other = torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)
    x = x * angles.cos() + other * angles.sin()
    return torch.cat([x, rest.expand(*x.shape[:-1], -1)], dim=-1)


def scores_differ(group: Group, sharing: Sharing, dim: int, pairs: Pairs) -> float:
    """By how much scores differ when N is absorbed before RoPE or applied to the shared key before it, relatively."""
    new, D = normal(50), group.grams.shape[-1]
    frequencies = 10_000 ** (-torch.arange(0, dim, 2).double() / dim)
    shared = group.inputs @ (sharing.reduce @ group.weight).T
    positions = torch.randint(0, 5000, (2, len(shared)), generator=torch.Generator().manual_seed(51)).double()
    largest = worst = 0.0
    for restore in sharing.restore:
        query = new(len(shared), D)
        absorbed = rope(query @ restore, positions[0], frequencies, pairs) * rope(
            shared, positions[1], frequencies, pairs
        )
        direct = rope(query, positions[0], frequencies, pairs)
        direct = direct * rope(shared @ restore.T, positions[1], frequencies, pairs)
        worst = max(worst, float((absorbed.sum(-1) - direct.sum(-1)).abs().max()))
        largest = max(largest, float(direct.sum(-1).abs().max()))
    return worst / largest


def lost(group: Group, sharing: Sharing, dim: int, pairs: Pairs) -> float:
    """The error for queries at all positions alike."""
    return error(sharing, circular(group.grams, pairs, dim), group.moments, group.owner)


def total(group: Group, dim: int, pairs: Pairs) -> float:
    D = group.grams.shape[-1]
    nothing = Sharing(torch.zeros(D, len(group.weight)).double(), torch.zeros(len(group.owner), D, D).double())
    return lost(group, nothing, dim, pairs)


def mean(group: Group) -> Sharing:
    return pooled(len(group.owner), max(group.owner) + 1, group.grams.shape[-1], group.owner)


def test_pairs_are_the_dimensions_that_rotate_together() -> None:
    for pairs in PAIRS:
        for dim in (2, 4, 10):
            real, imaginary = pair_indices(pairs, dim)
            assert list(zip(real.tolist(), imaginary.tolist(), strict=True)) == pairs_of(pairs, dim)
            # RoPE turns a real dimension into its imaginary one, and into no other.
            quarter = rope(torch.eye(dim).double(), torch.tensor(1.0), torch.full((dim // 2,), math.pi / 2), pairs)
            for i, j in zip(real, imaginary, strict=True):
                torch.testing.assert_close(quarter[i], torch.eye(dim).double()[j], atol=1e-6, rtol=0)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("D", "dim"), DIMS)
def test_what_query_heads_absorb_commutes_with_rope(
    D: int, dim: int, pairs: Pairs, rule: Callable[..., Sharing]
) -> None:
    for owner in OWNERS:
        group = draw(owner, D, 12, 0)
        sharing = rule(group.grams, group.moments, owner, pairs=pairs, dim=dim)
        assert scores_differ(group, sharing, dim, pairs) < 1e-10
        # What reduces heads to one commutes as well: the shared key is a key at its position.
        blocks = sharing.reduce.view(D, -1, D).transpose(0, 1)
        assert scores_differ(group, Sharing(sharing.reduce, blocks), dim, pairs) < 1e-10
        if dim > 2:  # one pair is the same in both layouts
            other: Pairs = "half" if pairs == "interleaved" else "interleaved"
            assert scores_differ(group, sharing, dim, other) > 1e-3
        assert scores_differ(group, low_rank(group.grams, group.moments, owner), dim, pairs) > 1e-3


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("D", "dim"), DIMS)
def test_pairs_weigh_as_scores_do_over_all_relative_positions(D: int, dim: int, pairs: Pairs) -> None:
    """The mean of squared score errors over a whole period, of queries and keys that are not circular at all."""
    owner, period = [0, 0, 1], 2 * dim + 3
    group, new = draw(owner, D, 9, 1), normal(2)
    queries = new(3, 7, D) @ new(3, D, D) + new(3, 1, D)
    frequencies = 2 * math.pi * (1 + torch.arange(dim // 2).double()) / period
    at_positions = rope(queries[:, :, None], torch.arange(period).double(), frequencies, pairs)
    sharing = rotary_low_rank(queries.mT @ queries / 7, group.moments, owner, pairs=pairs, dim=dim)
    missed = (group.own - sharing.restore @ (sharing.reduce @ group.weight)) @ group.inputs.T
    scores = torch.einsum("nqpd,nds->nqps", at_positions, missed).square().mean((1, 2, 3)).sum()
    grams = queries.mT @ queries / 7
    assert error(sharing, circular(grams, pairs, dim), group.moments, owner) == pytest.approx(float(scores), rel=1e-9)
    assert error(sharing, grams, group.moments, owner) != pytest.approx(float(scores), rel=1e-3)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("owner", "dim"), [([0, 1], 4), ([0, 0, 1], 2), ([0, 1, 2], 4), ([0, 1, 0, 2], 6)], ids=str)
def test_descent_over_complex_numbers_finds_nothing_better(owner: list[int], dim: int, pairs: Pairs) -> None:
    group, new, m = draw(owner, dim, 12, 3), normal(4), max(owner) + 1
    rule = rotary_low_rank(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    real, imaginary = zip(*pairs_of(pairs, dim), strict=True)
    heads = (group.inputs @ group.weight.T).view(-1, m, dim)
    z = torch.complex(heads[..., real], heads[..., imaginary])  # (samples, m, F)
    power = group.grams.diagonal(dim1=1, dim2=2)
    weights = power[:, real] + power[:, imaginary]  # (n, F)
    energy = 2 * total(group, dim, pairs)

    def loss(a: Tensor, c: Tensor) -> Tensor:
        shared = torch.einsum("mf,smf->sf", torch.view_as_complex(a), z)
        gap = z[:, owner] - torch.view_as_complex(c) * shared[:, None]
        return (weights * torch.view_as_real(gap).square().sum(-1)).sum((1, 2)).mean() / energy

    def numbers(matrices: Tensor) -> Tensor:
        return torch.stack([matrices[:, real, real], matrices[:, imaginary, real]], dim=-1)

    own = numbers(rule.reduce.view(dim, m, dim).transpose(0, 1)), numbers(rule.restore)
    share = lost(group, rule, dim, pairs) * 2 / energy
    assert float(loss(*own)) == pytest.approx(share, rel=1e-9)
    found = [descend(loss, *own)]
    found += [descend(loss, new(m, dim // 2, 2), new(len(owner), dim // 2, 2)) for _ in range(2)]
    assert min(found) > share * (1 - 1e-6)
    assert min(found[1:]) < share * (1 + 1e-6)
    aligned = rotary_procrustes(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    for other in (aligned, mean(group)):
        assert min(found) < lost(group, other, dim, pairs) * 2 / energy * 0.95


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("D", "dim"), DIMS)
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_keys_behind_complex_numbers_are_one_key(owner: list[int], D: int, dim: int, pairs: Pairs) -> None:
    new, m = normal(5), max(owner) + 1
    numbers = torch.complex(new(m, dim // 2), new(m, dim // 2))
    options = {"pairs": pairs, "dim": dim}

    def share(rule: Callable[..., Sharing], group: Group) -> float:
        sharing = rule(group.grams, group.moments, owner, **options)
        # All that counts is what reaches a score, so the whole grams may be taken when nothing is missed.
        return max(error(sharing, group.grams, group.moments, owner), lost(group, sharing, dim, pairs)) / group.energy()

    stretched = related(multiplications(numbers, new(m, D - dim, D - dim), pairs), 6, owner)
    assert share(rotary_low_rank, stretched) < 1e-9
    assert share(rotary_procrustes, stretched) > 1e-3
    assert lost(stretched, mean(stretched), dim, pairs) > 1e-2 * stretched.energy()

    turned = related(multiplications(numbers.sgn(), orthogonal(m, D - dim, 7), pairs), 8, owner)
    assert share(rotary_low_rank, turned) < 1e-9
    assert share(rotary_procrustes, turned) < 1e-9
    assert lost(turned, mean(turned), dim, pairs) > 1e-2 * turned.energy()

    # Maps that mix the two dimensions of a pair in another way, and the other layout, are out of reach.
    dense = related(new(m, D, D), 9, owner)
    assert share(rotary_low_rank, dense) > 1e-3
    if dim > 2:
        options["pairs"] = "half" if pairs == "interleaved" else "interleaved"
        assert share(rotary_low_rank, stretched) > 1e-3


@settings(deadline=None, max_examples=60)
@given(group=awkward(), pairs=st.sampled_from(PAIRS), data=st.data())
def test_nothing_that_commutes_is_better(group: Group, pairs: Pairs, data: st.DataObject) -> None:
    owner, D = group.owner, group.grams.shape[-1]
    dim = 2 * data.draw(st.integers(1, D // 2))
    slack = 1e-9 * total(group, dim, pairs)
    best = lost(group, rotary_low_rank(group.grams, group.moments, owner, pairs=pairs, dim=dim), dim, pairs)
    aligned = rotary_procrustes(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    assert best <= lost(group, aligned, dim, pairs) + slack
    assert best <= lost(group, mean(group), dim, pairs) + slack
    # Nor can it be better than what need not commute.
    dense = low_rank(circular(group.grams, pairs, dim), group.moments, owner)
    assert best >= lost(group, dense, dim, pairs) - slack


@settings(deadline=None, max_examples=30)
@given(
    heads=st.lists(st.integers(0, 3), min_size=1, max_size=5),
    pairs=st.sampled_from(PAIRS),
    seed=st.integers(0, 2**32 - 1),
    powers=st.tuples(st.integers(-40, 40), st.integers(-40, 40)),
)
def test_the_scale_of_the_metric_changes_nothing(
    heads: list[int], pairs: Pairs, seed: int, powers: tuple[int, int]
) -> None:
    owner = owners(heads)[1]
    group = draw(owner, 6, 4, seed)
    for rule in RULES:
        plain = rule(group.grams, group.moments, owner, pairs=pairs, dim=4)
        scaled = rule(group.grams * 4.0 ** powers[0], group.moments * 4.0 ** powers[1], owner, pairs=pairs, dim=4)
        before, after = lost(group, plain, 4, pairs), lost(group, scaled, 4, pairs)
        assert after == pytest.approx(before, rel=1e-6, abs=1e-9 * group.energy())


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_what_is_not_rotated_is_shared_as_if_alone(owner: list[int], pairs: Pairs) -> None:
    group, m = draw(owner, 7, 12, 10), max(owner) + 1
    alone = group.grams[:, 4:, 4:], group.moments.view(m, 7, m, 7)[:, 4:, :, 4:].reshape(m * 3, m * 3), owner
    for rule, plain in ((rotary_low_rank, low_rank), (rotary_procrustes, procrustes)):
        sharing, rest = rule(group.grams, group.moments, owner, pairs=pairs, dim=4), plain(*alone)
        reduce = sharing.reduce.view(7, m, 7)
        assert torch.equal(reduce[4:, :, 4:], rest.reduce.view(3, m, 3))
        assert torch.equal(sharing.restore[:, 4:, 4:], rest.restore)
        for mixed in (reduce[4:, :, :4], reduce[:4, :, 4:], sharing.restore[:, 4:, :4], sharing.restore[:, :4, 4:]):
            assert not mixed.any()


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_sizes_of_the_numbers(owner: list[int], pairs: Pairs) -> None:
    """Procrustes only turns; low-rank leaves each pair of the shared key as large as the pairs that it replaces."""
    group, m = draw(owner, 6, 12, 11), max(owner) + 1
    real, imaginary = zip(*pairs_of(pairs, 6), strict=True)
    turn = rotary_procrustes(group.grams, group.moments, owner, pairs=pairs, dim=6).restore
    sizes = turn[:, real, real].square() + turn[:, imaginary, real].square()
    torch.testing.assert_close(sizes, torch.ones_like(sizes))
    heads = group.inputs @ group.weight.T
    sharing = rotary_low_rank(group.grams, group.moments, owner, pairs=pairs, dim=6)
    shared = (heads @ sharing.reduce.T).square().mean(0)
    parents = heads.view(-1, m, 6).square().mean((0, 1))
    torch.testing.assert_close(shared[[*real]] + shared[[*imaginary]], parents[[*real]] + parents[[*imaginary]])


@pytest.mark.parametrize("owner", [[0, 1], [0, 0, 1], [0, 1, 1, 1]], ids=str)
def test_two_keys_are_turned_as_well_as_they_can_be(owner: list[int]) -> None:
    """The modulus of their cross moment is what one phase a pair can reach."""
    group = draw(owner, 6, 12, 12)
    sharing = rotary_procrustes(group.grams, group.moments, owner, pairs="half", dim=6)
    shares = [owner.count(0) / len(owner), owner.count(1) / len(owner)]
    heads = (group.inputs @ group.weight.T).view(-1, 2, 6)
    z = torch.complex(heads[..., :3], heads[..., 3:])
    best = sum(share**2 * z[:, i].abs().square().mean(0) for i, share in enumerate(shares))
    best = best + 2 * shares[0] * shares[1] * (z[:, 0] * z[:, 1].conj()).mean(0).abs()
    shared = (group.inputs @ (sharing.reduce @ group.weight).T).square().mean(0)
    torch.testing.assert_close(shared[:3] + shared[3:], best)
    pool = heads[:, owner].mean(1).square().mean(0)
    assert (pool[:3] + pool[3:] < 0.99 * best).any()
