"""The loss against naive formulas in float64, and the teacher's logits on the disk."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from regroup.errors import RegroupError
from regroup.uptraining.cache import TeacherCache
from regroup.uptraining.distill import Mix, TopK, aligned_targets, hidden_distance, mixed_loss, top_k
from regroup.uptraining.objective import IGNORED

V = 11


def case(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a student and a teacher (2, 7, V), and targets of which some are ignored."""
    generator = torch.Generator().manual_seed(3)
    student, teacher = (3 * torch.randn(2, 7, V, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, V, (2, 7), generator=generator)
    targets[0, :2] = IGNORED
    targets[1, 6] = IGNORED
    return student.to(dtype), teacher.to(dtype), targets


def naive(student: Tensor, teacher: Tensor, targets: Tensor, mix: Mix) -> tuple[Tensor, Tensor, Tensor]:
    """By torch's own functions, on the positions that carry loss."""
    asked = targets != IGNORED
    x, y, T = student[asked], teacher[asked], mix.temperature
    cross_entropy = functional.cross_entropy(x, targets[asked], reduction="sum")
    kl = functional.kl_div(
        functional.log_softmax(x / T, -1), functional.log_softmax(y / T, -1), reduction="sum", log_target=True
    )
    return (1 - mix.weight) * cross_entropy + mix.weight * T**2 * kl, cross_entropy, kl


def gradient(loss: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(loss, of)[0]


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.5])
@pytest.mark.parametrize("chunk", [0, 1, 4])
def test_loss_and_gradient_are_those_of_the_naive_formula(weight: float, temperature: float, chunk: int) -> None:
    student, teacher, targets = case()
    mix = Mix(weight, temperature)
    left, right = student.clone().requires_grad_(), student.clone().requires_grad_()
    wanted = list(naive(left, teacher, targets, mix))
    found = mixed_loss(right, targets, teacher=teacher, mix=mix, chunk=chunk)
    if weight == 0:
        wanted[2] = torch.zeros_like(wanted[2])  # not computed where it does not count
    torch.testing.assert_close(torch.stack(found), torch.stack(wanted), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(2 * found[0], right), gradient(2 * wanted[0], left), rtol=1e-12, atol=1e-12)


def test_another_temperature_is_noticed() -> None:
    student, teacher, targets = case()
    wanted = naive(student, teacher, targets, Mix(1.0, 2.0))[0]
    assert abs(float(mixed_loss(student, targets, teacher=teacher, mix=Mix(1.0, 1.0))[0] - wanted)) > 1


def test_ignored_positions_count_for_nothing() -> None:
    student, teacher, targets = case()
    student.requires_grad_()
    loss = mixed_loss(student, targets, teacher=teacher, mix=Mix(0.5))[0]
    found = gradient(loss, student)
    assert bool((found[targets == IGNORED] == 0).all())
    assert bool((found[targets != IGNORED].abs().sum(-1) > 0).all())
    other = teacher.clone()
    other[targets == IGNORED] = torch.nan
    assert mixed_loss(student.detach(), targets, teacher=other, mix=Mix(0.5))[0] == loss.detach()


def test_without_a_teacher_it_is_cross_entropy() -> None:
    student, teacher, targets = case()
    student.requires_grad_()
    loss, cross_entropy, kl = mixed_loss(student, targets)
    wanted = naive(student, teacher, targets, Mix())[1]
    torch.testing.assert_close(loss, wanted, rtol=1e-12, atol=1e-12)
    assert (loss == cross_entropy, float(kl)) == (True, 0.0)
    loss.backward()
    assert student.grad is not None


def test_nothing_asked_is_nothing_lost() -> None:
    student, teacher, targets = case()
    student.requires_grad_()
    loss = mixed_loss(student, torch.full_like(targets, IGNORED), teacher=teacher, mix=Mix(1.0))[0]
    assert float(loss.detach()) == 0
    assert bool((gradient(loss, student) == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_in_fewer_bits_are_summed_in_float32(dtype: torch.dtype) -> None:
    student, teacher, targets = case(dtype)
    student.requires_grad_()
    loss, cross_entropy, kl = mixed_loss(student, targets, teacher=teacher, mix=Mix(0.5, 2.0))
    assert {value.dtype for value in (loss, cross_entropy, kl)} == {torch.float32}
    wide = student.detach().double().requires_grad_()
    wanted = naive(wide, teacher.double(), targets, Mix(0.5, 2.0))
    torch.testing.assert_close(
        torch.stack([loss, cross_entropy, kl]).double(), torch.stack(wanted), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(gradient(loss, student).double(), gradient(wanted[0], wide), rtol=1e-2, atol=1e-2)


def test_a_perfect_student_has_no_kl() -> None:
    student, _, targets = case()
    assert float(mixed_loss(student, targets, teacher=student, mix=Mix(1.0))[0]) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_top_k_is_the_kl_of_the_coarser_distribution(k: int, temperature: float) -> None:
    student, teacher, targets = case()
    mix = Mix(1.0, temperature)
    known = top_k(teacher, targets, k, temperature, chunk=3)
    left, right = student.clone().requires_grad_(), student.clone().requires_grad_()
    found = mixed_loss(right, targets, teacher=known, mix=mix, chunk=5)

    asked = targets != IGNORED
    p, q = (left[asked] / temperature).softmax(-1), (teacher[asked] / temperature).softmax(-1)
    order = q.argsort(-1, descending=True)
    p, q = p.gather(-1, order), q.gather(-1, order)
    p, q = (torch.cat([d[:, :k], d[:, k:].sum(-1, keepdim=True)], -1) for d in (p, q))
    kl = (q * (q.log() - p.log())).sum()
    torch.testing.assert_close(found[2], kl.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient(found[0], right), gradient(temperature**2 * kl, left), rtol=1e-9, atol=1e-9)
    whole = mixed_loss(student, targets, teacher=teacher, mix=mix)[2]
    assert float(found[2]) <= float(whole) * (1 + 1e-12)
    # With all but one token told apart, nothing is coarser; with fewer, something is lost here.
    assert (float(found[2]) == pytest.approx(float(whole), rel=1e-10)) == (k == V - 1)


def test_top_k_of_a_certain_teacher_stays_finite() -> None:
    student, _, targets = case(torch.float32)
    teacher = functional.one_hot(targets.clamp(min=0), V) * 1e4
    student.requires_grad_()
    loss = mixed_loss(student, targets, teacher=top_k(teacher.float(), targets, 3), mix=Mix(1.0))[0]
    assert bool(torch.isfinite(loss))
    assert bool(torch.isfinite(gradient(loss, student)).all())


def test_causal_labels_are_moved_by_one() -> None:
    labels = torch.tensor([[5, IGNORED, 7]])
    assert aligned_targets(labels, shifted=True).tolist() == [[IGNORED, 7, IGNORED]]
    assert aligned_targets(labels, shifted=False).tolist() == [[5, IGNORED, 7]]


# ---- the cache -------------------------------------------------------------------------------------------------------

FACTS = {"data": ["a.txt"], "seed": 0}


def opened(folder: Path, **changes: object) -> TeacherCache:
    return TeacherCache(folder, {**FACTS, **changes}, k=4, positions=6, vocabulary=V)


def kept(folder: Path) -> tuple[TeacherCache, TopK, list[int]]:
    _, teacher, targets = case(torch.float32)
    counts = (targets != IGNORED).sum(1).tolist()
    cache, known = opened(folder), top_k(teacher, targets, 4)
    cache.write([7, 2], counts, known)
    return cache, known, counts


def test_what_was_written_is_read_in_any_order(tmp_path: Path) -> None:
    cache, known, counts = kept(tmp_path)
    found = opened(tmp_path).read([2, 7], counts[::-1])
    assert found is not None
    swapped = [torch.cat(part.split(counts)[::-1]) for part in (known.ids, known.log_q)]
    assert torch.equal(found.ids, swapped[0])
    torch.testing.assert_close(found.log_q, swapped[1], rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(found.log_q.logsumexp(-1), torch.zeros(len(found.ids)), atol=1e-6, rtol=0)
    assert not cache.missing([2, 7])


@pytest.mark.parametrize("number", [0, 3, 8, 100])
def test_what_was_not_written_is_missing(tmp_path: Path, number: int) -> None:
    cache, _, counts = kept(tmp_path)
    assert cache.missing([2, number])
    assert cache.read([number], counts[:1]) is None


def test_a_damaged_place_is_not_read(tmp_path: Path) -> None:
    cache, _, counts = kept(tmp_path)
    assert cache.read([7], [counts[0] - 1]) is None
    size = cache.path.stat().st_size
    with cache.path.open("r+b") as file:
        file.seek(size - 3)  # inside example 7, the last one
        file.write(b"\xff")
    assert cache.read([7], counts[:1]) is None
    assert cache.read([2], counts[1:]) is not None
    os.truncate(cache.path, size - 8)
    assert cache.read([7], counts[:1]) is None


def test_a_cache_of_another_run_is_refused(tmp_path: Path) -> None:
    kept(tmp_path)
    with pytest.raises(RegroupError, match=r"belongs to another run(.|\n)*seed 1, not 0(.|\n)*--teacher-cache"):
        opened(tmp_path, seed=1)
    with pytest.raises(RegroupError, match="belongs to another run"):
        TeacherCache(tmp_path, FACTS, k=3, positions=6, vocabulary=V)
    (tmp_path / "teacher.bin").write_bytes(b"something else")
    with pytest.raises(RegroupError, match="belongs to another run"):
        opened(tmp_path)


def test_a_folder_that_cannot_be_made_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegroupError, match="cannot be used"):
        opened(tmp_path / "file" / "cache")


def test_ids_of_large_vocabularies_fit(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path, FACTS, k=1, positions=2, vocabulary=200_000)
    cache.write([0], [1], TopK(torch.tensor([[150_000]]), torch.tensor([[-0.5, -0.93]])))
    found = cache.read([0], [1])
    assert found is not None
    assert found.ids.tolist() == [[150_000]]


# ---- hidden states ---------------------------------------------------------------------------------------------------


def states(seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three layers of (2, 7, 5), the first position of each row a thousand times as large."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, 7, 5, generator=generator, dtype=torch.float64) for _ in range(3)]
    for layer in made:
        layer[:, 0] *= 1000
    return [layer.to(dtype) for layer in made]


def test_hidden_distance_is_that_of_a_loop() -> None:
    student, teacher, targets = states(1), states(2), case()[2]
    student[1].requires_grad_()
    found = hidden_distance(student, teacher, targets)
    wanted = 0.0
    for own, other in zip(student, teacher, strict=True):
        for row, position in (targets != IGNORED).nonzero().tolist():
            s, t = own.detach()[row, position], other[row, position]
            wanted += float((s - t) @ (s - t) / ((s @ s + t @ t) / 2)) / 3
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-12)
    slope = gradient(found, student[1])
    assert bool((slope[targets == IGNORED] == 0).all())
    sizes = (student[1].detach().square() + teacher[1].square()).sum(-1, keepdim=True) / 2
    right = 2 * (student[1] - teacher[1]).detach() / sizes / 3
    torch.testing.assert_close(slope[targets != IGNORED], right[targets != IGNORED], rtol=1e-12, atol=0)


def test_hidden_distance_sums_over_pieces_of_a_batch() -> None:
    student, teacher, targets = states(1), states(2), case()[2]
    parts = [
        hidden_distance(
            [x[row : row + 1] for x in student], [x[row : row + 1] for x in teacher], targets[row : row + 1]
        )
        for row in range(2)
    ]
    torch.testing.assert_close(sum(parts), hidden_distance(student, teacher, targets), rtol=1e-12, atol=0)


def test_equal_hidden_states_have_no_distance_and_others_have() -> None:
    teacher, targets = states(2), case()[2]
    assert float(hidden_distance([x.clone() for x in teacher], teacher, targets)) == 0
    assert float(hidden_distance([teacher[0], teacher[2], teacher[1]], teacher, targets)) > 1
    assert hidden_distance(states(1, torch.bfloat16), states(2, torch.bfloat16), targets).dtype == torch.float32


def test_a_state_of_zeros_is_no_division_by_zero() -> None:
    zeros = [torch.zeros(2, 7, 5)]
    assert float(hidden_distance(zeros, zeros, case()[2])) == 0
