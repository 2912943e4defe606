"""Residual energies against the sharings that reach them, against descent, and where they are known."""

from __future__ import annotations

import math

import pytest
import torch
from groups import OWNERS, PAIRS, Group, Pairs, awkward, circular, descend, draw, multiplications, normal, related
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from regroup.merge import residual
from regroup.merge.lowrank import low_rank
from regroup.merge.procrustes import procrustes
from regroup.merge.residual import linear_residual, pair_residuals, rotary_residual
from regroup.merge.rotary import rotary_low_rank, rotary_procrustes
from regroup.merge.sharing import Sharing, error, owners, pooled

# Head dimension and how much of it RoPE rotates.
DIMS = [(2, 2), (6, 6), (6, 2), (7, 4)]


def shared_in_pairs(gap: Tensor, keys: Tensor, queries: Tensor, dim: int, pairs: Pairs) -> float:
    """Σ_f E|q_f|²/2 · E|gap of z_f|² for one head, from samples, plus the mean squared scores of what is not rotated.

    gap (D, m·D) is applied to keys (samples, m·D); queries (samples, D).
    """
    missed = keys @ gap.T
    found = 0.0
    for i, j in [(f, f + dim // 2) if pairs == "half" else (2 * f, 2 * f + 1) for f in range(dim // 2)]:
        power = torch.complex(queries[:, i], queries[:, j]).abs().square().mean()
        found += float(power / 2 * torch.complex(missed[:, i], missed[:, j]).abs().square().mean())
    return found + float((queries[:, dim:] @ missed[:, dim:].T).square().mean())


def nothing(group: Group) -> Sharing:
    n, D = group.grams.shape[:2]
    return Sharing(torch.zeros(D, len(group.weight)).double(), torch.zeros(n, D, D).double())


def summed(group: Group) -> Tensor:
    """Grams added up over the query heads of each KV head, one by one."""
    out = torch.zeros(max(group.owner) + 1, *group.grams.shape[1:], dtype=torch.float64)
    for gram, place in zip(group.grams, group.owner, strict=True):
        out[place] += gram
    return out


@pytest.mark.parametrize("D", [1, 2, 5])
@pytest.mark.parametrize("owner", [*OWNERS, [0], [0, 0, 0]], ids=str)
def test_lost_is_the_error_of_the_best_sharing(owner: list[int], D: int) -> None:
    for hidden in (D + 1, 3 * D):
        group = draw(owner, D, hidden, 0)
        lost, total = linear_residual(group.grams, group.moments, owner)
        assert total == pytest.approx(group.energy(), rel=1e-9)
        best = low_rank(group.grams, group.moments, owner)
        assert lost == pytest.approx(error(best, group.grams, group.moments, owner), rel=1e-9, abs=1e-12 * total)
        if max(owner):
            mean = pooled(len(owner), max(owner) + 1, D, owner)
            assert lost < 0.9 * error(mean, group.grams, group.moments, owner)
        else:
            assert lost == 0


@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_the_smaller_problem_is_the_same_problem(owner: list[int]) -> None:
    """All but the D largest eigenvalues of T K Tᵀ, (n·D, n·D), written out; T from Cholesky factors, not roots."""
    D, m = 3, max(owner) + 1
    group = draw(owner, D, 12, 1)
    T = torch.zeros(len(owner), D, m, D, dtype=torch.float64)
    for h, place in enumerate(owner):
        T[h, :, place] = torch.linalg.cholesky(group.grams[h]).T
    T = T.view(-1, m * D)
    values = torch.linalg.eigvalsh(T @ group.moments @ T.T)
    assert len(values) == len(owner) * D
    lost, total = linear_residual(group.grams, group.moments, owner)
    assert lost == pytest.approx(float(values[:-D].sum()), rel=1e-9)
    assert total == pytest.approx(float(values.sum()), rel=1e-9)
    turned = linear_residual(group.grams.flip(0), group.moments, owner)
    assert turned[0] != pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("D", "dim"), DIMS)
@pytest.mark.parametrize("owner", [*OWNERS, [0, 0]], ids=str)
def test_lost_keys_are_the_error_of_the_best_that_commutes(owner: list[int], D: int, dim: int, pairs: Pairs) -> None:
    group = draw(owner, D, 3 * D, 2)
    lost, total = rotary_residual(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    metric = circular(group.grams, pairs, dim)
    best = rotary_low_rank(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    assert lost == pytest.approx(error(best, metric, group.moments, owner), rel=1e-9, abs=1e-12 * total)
    assert total == pytest.approx(error(nothing(group), metric, group.moments, owner), rel=1e-9)
    if not max(owner):
        assert lost == 0
        return
    turned = rotary_procrustes(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    assert lost < error(turned, metric, group.moments, owner)
    # Maps that need not commute lose less, and the other layout of pairs is another problem.
    assert lost > linear_residual(metric, group.moments, owner)[0]
    if dim > 2:
        other: Pairs = "half" if pairs == "interleaved" else "interleaved"
        assert lost != pytest.approx(rotary_residual(group.grams, group.moments, owner, pairs=other, dim=dim)[0])


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("D", "dim"), DIMS)
def test_the_rotary_metric_written_out_in_complex_numbers(D: int, dim: int, pairs: Pairs) -> None:
    """E|q_f|² times |z_h - c z̃|² of each pair, from samples of queries and keys, and what is not rotated beside it."""
    owner, new = [0, 0, 1], normal(3)
    group = draw(owner, D, 9, 4)
    queries = new(3, 11, D) @ new(3, D, D)
    grams, keys = queries.mT @ queries / 11, group.inputs @ group.weight.T
    lost, total = rotary_residual(grams, group.moments, owner, pairs=pairs, dim=dim)
    sharing = rotary_low_rank(grams, group.moments, owner, pairs=pairs, dim=dim)
    own = torch.eye(2 * D).double().view(2, D, 2 * D)[owner]
    for maps, expected in ((own - sharing.restore @ sharing.reduce, lost), (own, total)):
        written = sum(shared_in_pairs(maps[h], keys, queries[h], dim, pairs) for h in range(3))
        assert written == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("owner", "D"), [([0, 1], 2), ([0, 0, 1], 3), ([0, 1, 2], 2)], ids=str)
def test_descent_finds_nothing_better(owner: list[int], D: int) -> None:
    group, new = draw(owner, D, 8, 5), normal(6)
    share = linear_residual(group.grams, group.moments, owner)[0] / group.energy()
    n, wide = len(owner), len(group.weight)
    starts = [(new(D, wide) / wide, new(n, D, D)) for _ in range(4)]
    found = [descend(lambda R, N: group.measure(R, N) / group.energy(), *start) for start in starts]
    assert share * (1 - 1e-6) < min(found) < share * (1 + 1e-3)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("D", "dim"), [(4, 4), (5, 2)])
def test_descent_over_complex_numbers_finds_nothing_better(D: int, dim: int, pairs: Pairs) -> None:
    owner, new, rest = [0, 0, 1], normal(7), D - dim
    group = draw(owner, D, 8, 8)
    metric = circular(group.grams, pairs, dim)
    lost, total = rotary_residual(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    own = torch.eye(2 * D).double().view(2, D, 2 * D)[owner]

    def measure(a: Tensor, A: Tensor, c: Tensor, C: Tensor) -> Tensor:
        R = multiplications(torch.view_as_complex(a), A, pairs).transpose(0, 1).reshape(D, 2 * D)
        gap = own - multiplications(torch.view_as_complex(c), C, pairs) @ R
        return torch.einsum("hij,hjk,kl,hil->", metric, gap, group.moments, gap) / total

    starts = [(new(2, dim // 2, 2), new(2, rest, rest), new(3, dim // 2, 2), new(3, rest, rest)) for _ in range(4)]
    found = min(descend(measure, *start) for start in starts)
    assert lost / total * (1 - 1e-6) < found < lost / total * (1 + 1e-3)


@pytest.mark.parametrize("rotary", [None, *((pairs, dim) for pairs in PAIRS for dim in (6, 4))], ids=str)
@pytest.mark.parametrize("owner", OWNERS, ids=str)
def test_identical_heads_lose_nothing(owner: list[int], rotary: tuple[Pairs, int] | None) -> None:
    D, m = 6, max(owner) + 1
    same = related(torch.eye(D).double().expand(m, D, D), 9, owner)
    other = draw(owner, D, 3 * D, 9)
    for group, low, high in ((same, 0.0, 1e-12), (other, 1e-2, 1.0)):
        if rotary is None:
            lost, total = linear_residual(group.grams, group.moments, owner)
        else:
            lost, total = rotary_residual(group.grams, group.moments, owner, pairs=rotary[0], dim=rotary[1])
        assert low <= lost / total <= high
        table = pair_residuals(summed(group), group.moments, rotary)
        off = table[~torch.eye(m, dtype=torch.bool)]
        assert float(off.min()) >= low
        assert float(off.max()) <= high


@pytest.mark.parametrize("D", [2, 4])
def test_orthogonal_heads_lose_all_but_one(D: int) -> None:
    """Unrelated heads of equal weight: one of m directions can be kept. The weaker of two unequal ones is lost."""
    for m in (2, 3, 5):
        grams, moments = torch.eye(D).expand(m, D, D), torch.eye(m * D)
        for lost, total in (
            linear_residual(grams, moments, range(m)),
            rotary_residual(grams, moments, range(m), pairs="half", dim=D),
        ):
            assert (lost, total) == pytest.approx(((m - 1) * D, m * D))
        strengths = torch.arange(1.0, m + 1).double()
        table = pair_residuals(grams * strengths[:, None, None], moments)
        expected = torch.minimum(strengths[:, None], strengths) / (strengths[:, None] + strengths)
        torch.testing.assert_close(table, expected.fill_diagonal_(0))
        assert float(table.max()) <= 0.5


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("owner", [[0, 1], [0, 0, 1], [0, 1, 2, 2], [2, 0, 1, 3, 3]], ids=str)
@pytest.mark.parametrize("bytes_at_a_time", [1, 32 << 20])
def test_the_table_is_every_pair_alone(
    bytes_at_a_time: int, owner: list[int], pairs: Pairs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residual, "_CHUNK_BYTES", bytes_at_a_time)
    D, m = 6, max(owner) + 1
    group = draw(owner, D, 12, 10)
    blocks = group.moments.view(m, D, m, D)
    rotaries: list[tuple[Pairs, int] | None] = [None, (pairs, 6), (pairs, 2)]
    for rotary in rotaries:
        table = pair_residuals(summed(group), group.moments, rotary)
        assert (table.dtype, table.shape) == (torch.float64, (m, m))
        assert torch.equal(table, table.T)
        assert not table.diagonal().any()
        for a in range(m):
            for b in range(a + 1, m):
                # Of the query heads themselves, not of their sums.
                heads = [h for h, place in enumerate(owner) if place in (a, b)]
                grams, places = group.grams[heads], [int(owner[h] == b) for h in heads]
                both = torch.tensor([a, b])
                moments = blocks[both][:, :, both].reshape(2 * D, 2 * D)
                if rotary is None:
                    lost, total = linear_residual(grams, moments, places)
                else:
                    lost, total = rotary_residual(grams, moments, places, pairs=rotary[0], dim=rotary[1])
                assert float(table[a, b]) == pytest.approx(lost / total, rel=1e-9)
    if m > 2:
        wrong = pair_residuals(summed(group).flip(0), group.moments)
        assert not torch.allclose(wrong, pair_residuals(summed(group), group.moments), rtol=1e-3)


def test_heads_without_energy_lose_nothing() -> None:
    grams, moments = torch.zeros(3, 4, 4), torch.zeros(12, 12)
    assert linear_residual(grams, moments, range(3)) == (0, 0)
    assert rotary_residual(grams, moments, range(3), pairs="half", dim=2) == (0, 0)
    rotaries: list[tuple[Pairs, int] | None] = [None, ("half", 4), ("interleaved", 2)]
    for rotary in rotaries:
        assert not pair_residuals(grams, moments, rotary).any()
    assert pair_residuals(torch.ones(1, 1, 1), torch.ones(1, 1)).tolist() == [[0]]


def test_threads_are_as_many_afterwards() -> None:
    group, before = draw([0, 1], 2, 6, 11), torch.get_num_threads()
    pair_residuals(group.grams, group.moments)
    linear_residual(group.grams, group.moments, group.owner)
    assert torch.get_num_threads() == before


@settings(deadline=None, max_examples=100)
@given(
    heads=st.lists(st.integers(0, 3), min_size=1, max_size=6),
    D=st.integers(2, 6),
    hidden=st.integers(1, 14),
    pairs=st.sampled_from(PAIRS),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_of_every_shape(heads: list[int], D: int, hidden: int, pairs: Pairs, seed: int, data: st.DataObject) -> None:
    owner, dim = owners(heads)[1], 2 * data.draw(st.integers(1, D // 2))
    group = draw(owner, D, hidden, seed)
    metric = circular(group.grams, pairs, dim)
    linear = linear_residual(group.grams, group.moments, owner)
    rotary = rotary_residual(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    for (lost, total), weights, rule in (
        (linear, group.grams, low_rank(group.grams, group.moments, owner)),
        (rotary, metric, rotary_low_rank(group.grams, group.moments, owner, pairs=pairs, dim=dim)),
    ):
        assert total == pytest.approx(error(nothing(group), weights, group.moments, owner), rel=1e-9)
        assert lost == pytest.approx(error(rule, weights, group.moments, owner), abs=1e-9 * total)
        assert 0 <= lost <= total
    for table in (
        pair_residuals(summed(group), group.moments),
        pair_residuals(summed(group), group.moments, (pairs, dim)),
    ):
        assert ((table >= 0) & (table <= 0.5 + 1e-12)).all()


@settings(deadline=None, max_examples=60)
@given(group=awkward(), pairs=st.sampled_from(PAIRS))
def test_nothing_awkward_breaks_it(group: Group, pairs: Pairs) -> None:
    """Heads that are zero, huge or tiny beside each other: nothing shared is better, to the rounding of the sums."""
    owner, D = group.owner, group.grams.shape[-1]
    dim = D // 2 * 2
    lost, total = linear_residual(group.grams, group.moments, owner)
    aligned = procrustes(group.grams, group.moments, owner)
    assert lost <= error(aligned, group.grams, group.moments, owner) + 1e-9 * total
    rotary = rotary_residual(group.grams, group.moments, owner, pairs=pairs, dim=dim)
    for table in (
        pair_residuals(summed(group), group.moments),
        pair_residuals(summed(group), group.moments, (pairs, dim)),
    ):
        assert table.isfinite().all()
        assert ((table >= 0) & (table <= 0.5 + 1e-9)).all()
    assert all(math.isfinite(value) and value >= 0 for value in (lost, total, *rotary))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_dtype_is_computed_in_float64(dtype: torch.dtype) -> None:
    group = draw([0, 1, 1], 4, 6, 12)
    grams, moments = group.grams.to(dtype), group.moments.to(dtype)
    wide = grams.double(), moments.double()
    assert linear_residual(grams, moments, group.owner) == linear_residual(*wide, group.owner)
    narrow = rotary_residual(grams, moments, group.owner, pairs="half", dim=2)
    assert narrow == rotary_residual(*wide, group.owner, pairs="half", dim=2)
    pair = grams[:2], moments
    assert torch.equal(pair_residuals(*pair, ("half", 2)), pair_residuals(wide[0][:2], wide[1], ("half", 2)))
