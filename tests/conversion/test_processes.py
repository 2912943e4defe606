"""Calibration by several processes: the same sums, the same child, one voice, and no process left waiting."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import regroup
import teams
import texts
import tiny
from helpers import everything, layout_of, logits, run
from regroup import RegroupError
from regroup.calibration.repair import distill
from regroup.calibration.settings import DistillSettings, Settings
from regroup.plans import Plan, make_plan
from regroup.processes import SINGLE_PROCESS, ProcessGroup
from regroup.solver.statistics import Moments
from teams import Crew

Saved = Callable[[str], Path]
# Odd, so that one process has a batch more than the other; one of them is held out.
BATCHES = 7
WORDS = ("--kv-heads", 2, "--calibration-window", 32, "--calibration-batch", 2, "--calibration-tokens", 7 * 64)


@pytest.fixture(scope="module")
def two() -> Iterator[Crew]:
    crew = Crew(2)
    yield crew
    crew.pool.shutdown()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(texts.TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with a tokenizer, in float32."""
    folder = tiny.save("llama", tmp_path_factory.mktemp("parent") / "parent")
    texts.tokenizer().save_pretrained(folder)
    return folder


def parts(found: list[Moments]) -> dict[str, torch.Tensor]:
    """Every tensor of the moments by a name."""
    named = {}
    for number, moments in enumerate(found):
        for field in fields(moments):
            value = getattr(moments, field.name)
            each = value if isinstance(value, list) else [value]
            named |= {f"{number}.{field.name}.{place}": one for place, one in enumerate(each)}
    return named


def apart(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest element."""
    assert one.keys() == other.keys()
    return max(float((one[name] - other[name]).abs().max() / one[name].abs().max()) for name in one)


def answers(folder: Path, name: str) -> torch.Tensor:
    """Logits of a checkpoint."""
    return logits(regroup.load(folder, dtype=torch.float32, progress=False).eval(), name)


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_moments_are_those_of_one_process(name: str, two: Crew, saved: Saved) -> None:
    """They are the same float64 numbers, added in another order."""
    folder = saved(name)
    given = (folder, name, make_plan(layout_of(folder), 2, method="auto"), BATCHES)
    expected, kept = teams.alone(teams.moments, *given, True)
    assert kept == BATCHES
    (first, own), (second, others) = two(teams.joined, teams.moments, *given, True)
    assert len(first) == len(expected) > 0
    assert apart(parts(expected), parts(first)) < 1e-12
    assert apart(parts(first), parts(second)) == 0
    # Each process keeps hidden states of its own batches.
    assert (own, others) == (4, 3)


def test_moments_that_are_not_merged_are_others(two: Crew, saved: Saved) -> None:
    folder = saved("llama")
    given = (folder, "llama", make_plan(layout_of(folder), 2, method="auto"), BATCHES)
    expected, _ = teams.alone(teams.moments, *given, True)
    for found, _ in two(teams.joined, teams.moments, *given, False):
        by_name = parts(found)
        # A search on other moments may find other groups.
        assert apart({name: value for name, value in parts(expected).items() if name in by_name}, by_name) > 1e-3


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("repair", ["none", "output"])
def test_the_child_is_that_of_one_process(name: str, repair: str, two: Crew, saved: Saved, tmp_path: Path) -> None:
    """Sums differ by their order, 1e-15 of their size or so; solving and float32 make of that what is allowed here.

    Children are compared by what they answer: eigenvectors may come with either sign, which queries and outputs undo.
    """
    folder = saved(name)
    plan = make_plan(layout_of(folder), 1, method="auto")
    settings = Settings(repair=repair)
    found = []
    for place, processes in (("one", 1), ("two", 2)):
        (tmp_path / place).mkdir()
        given = (folder, name, plan, tmp_path / place, BATCHES, settings)
        if processes == 1:
            found.append(teams.alone(teams.solved, *given))
        else:
            found += two(teams.joined, teams.solved, *given)
    (wanted, outcomes, kl, tensors), (first, ours, first_kl, made), (second, theirs, second_kl, nothing) = found
    assert first == second == wanted
    assert made == tensors
    assert nothing == []
    assert ours == theirs
    assert first_kl == second_kl == pytest.approx(kl, rel=1e-5)
    for one, other in zip(outcomes, ours, strict=True):
        assert (one.name, one.key_method, one.value_method) == (other.name, other.key_method, other.value_method)
        assert other.error == pytest.approx(one.error, rel=1e-5)
        assert other.error_merged == pytest.approx(one.error_merged, rel=1e-5)
    expected = answers(tmp_path / "one" / "child", name)
    torch.testing.assert_close(answers(tmp_path / "two" / "child", name), expected, rtol=1e-4, atol=1e-4)
    # It would be seen if a batch were left out.
    (tmp_path / "less").mkdir()
    teams.alone(teams.solved, folder, name, plan, tmp_path / "less", BATCHES - 1, settings)
    assert not torch.allclose(answers(tmp_path / "less" / "child", name), expected, atol=1e-2)


def test_distillation_adds_the_gradients_of_a_batch_of_each(two: Crew) -> None:
    """Against one process whose batches are pairs; five to fit, so that the last step has one alone."""
    settings = DistillSettings(learning_rate=0.1)
    (weights, before, after), (theirs, *errors) = two(teams.joined, teams.trained, BATCHES, settings)
    assert torch.equal(weights, theirs)
    assert [before, after] == errors
    module, data = teams.problem(BATCHES)
    # Each process goes through its own batches in an order of its own: 0, 2 and 4 in one, 1 and 3 in the other.
    draw = [torch.Generator().manual_seed(0) for _ in range(2)]
    order = [pair for _ in range(settings.passes) for pair in _pairs(draw)]

    def loss_of(pair: int) -> torch.Tensor:
        of = (5, 6) if pair == 3 else order[next(step)]
        return torch.stack([(module(data[b][0]) - data[b][1]).square().sum() for b in of]).sum()

    step = iter(range(len(order)))
    start, end = distill(module, ["weight", "bias"], loss_of, range(3), range(3, 4), settings)
    expected = teams.weights_of(module)
    torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
    # The sum over a pair is twice the mean.
    assert (before, after) == pytest.approx((start / 2, end / 2), rel=1e-5)
    assert after < before
    # One process alone takes a step a batch, and comes to something else.
    assert not torch.allclose(teams.alone(teams.trained, BATCHES, settings)[0], expected, atol=1e-3)


def _pairs(draw: list[torch.Generator]) -> list[tuple[int, ...]]:
    """The batches of each step of a pass."""
    first, second = ([(0, 2, 4), (1, 3)][k] for k in range(2))
    ours = [first[place] for place in torch.randperm(3, generator=draw[0]).tolist()]
    theirs = [second[place] for place in torch.randperm(2, generator=draw[1]).tolist()]
    return [(one, *theirs[place : place + 1]) for place, one in enumerate(ours)]


def test_distillation_of_a_layer_is_no_worse_than_its_repair(two: Crew, saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama")
    plan = make_plan(layout_of(folder), 1, method="lowrank")
    errors = {}
    for repair in ("output", "distill"):
        (tmp_path / repair).mkdir()
        settings = Settings(repair=repair)
        given = (folder, "llama", plan, tmp_path / repair, 32, settings)
        (_, ours, _, _), (_, theirs, _, _) = two(teams.joined, teams.solved, *given)
        assert ours == theirs
        errors[repair] = ours[0].error
    assert errors["distill"] <= errors["output"]


def test_a_launcher_converts_as_one_process_does(text: Path, parent: Path, tmp_path: Path) -> None:
    words = ("--calibration", text, *WORDS, "--device", "cpu", "--repair", "output")
    status, _, err = run("convert", parent, tmp_path / "one", *words)
    assert status == 0, err
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = subprocess.run(
        [*launch, "-m", "regroup.cli", "convert", str(parent), str(tmp_path / "two"), *map(str, words)],
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
    )
    assert process.returncode == 0, process.stderr
    # The first process alone speaks, and nothing but the child is left.
    assert process.stderr.count("wrote ") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]
    assert everything(tmp_path / "one") == everything(tmp_path / "two")
    one, both = (
        json.loads((tmp_path / name / "regroup_result.json").read_text())["calibration"] for name in ("one", "two")
    )
    assert both["held_out_kl_nats_per_token"] == pytest.approx(one["held_out_kl_nats_per_token"], rel=1e-3)
    expected, made = (answers(tmp_path / name, "llama") for name in ("one", "two"))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("at", [0, 1])
def test_an_error_of_either_process_ends_both(at: int, two: Crew, text: Path, parent: Path, tmp_path: Path) -> None:
    words = ("convert", parent, tmp_path / "child", "--calibration", text, *WORDS, "--device", "cpu")
    (status, err), (other, silence) = two(teams.command_that_fails, at, RegroupError, *words)
    assert (status, other) == (2, 2)
    assert err.count("error: a planned fault") == 1
    assert silence == ""
    assert list(tmp_path.iterdir()) == []


def test_what_nobody_foresaw_ends_both(two: Crew, text: Path, parent: Path, tmp_path: Path) -> None:
    words = ("convert", parent, tmp_path / "child", "--calibration", text, *WORDS, "--device", "cpu")
    (status, err), (other, _) = two(teams.command_that_fails, 1, ValueError, *words)
    assert (status, other) == (2, 1)  # the second has its traceback
    assert "one of the processes failed" in err
    assert "process 1: ValueError: a planned fault" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--kv-heads", 2, "--method", "mean"), "there is no calibration text for them to share"),
        (("--kv-heads", 4, "--calibration", "TEXT"), "cannot be divided into that many groups"),
        (
            ("--kv-heads", 2, "--calibration", "TEXT", "--uptrain", "TEXT"),
            "--uptrain does not run in several processes",
        ),
    ],
)
def test_what_several_processes_cannot_do(
    words: tuple[object, ...], message: str, two: Crew, text: Path, parent: Path, tmp_path: Path
) -> None:
    given = (text if word == "TEXT" else word for word in words)
    (status, err), (other, silence) = two(teams.command, "convert", parent, tmp_path / "child", *given)
    assert (status, other, silence) == (2, 2, "")
    assert message in err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_several_writes_nothing(two: Crew, text: Path, parent: Path, tmp_path: Path) -> None:
    words = ("convert", parent, tmp_path / "child", "--calibration", text, *WORDS, "--dry-run")
    (status, err), other = two(teams.command, *words)
    assert status == 0, err
    assert "dry run: nothing was written" in err
    assert other == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_a_budget_is_divided_as_by_one_process(two: Crew, text: Path, parent: Path, tmp_path: Path) -> None:
    words = ("--kv-budget", "50%", "--calibration", text, *WORDS[2:], "--device", "cpu", "--seed", 0)
    assert run("plan", parent, *words, "-o", tmp_path / "one.json")[0] == 0
    (status, err), other = two(teams.command, "plan", parent, *words, "-o", tmp_path / "two.json")
    assert status == 0, err
    assert other == (0, "")
    one, both = Plan.load(tmp_path / "one.json"), Plan.load(tmp_path / "two.json")
    assert both.predicted_kl == pytest.approx(one.predicted_kl, rel=1e-3)
    assert [layer.num_key_value_heads for layer in both.layers] == [layer.num_key_value_heads for layer in one.layers]
    assert [layer.methods for layer in both.layers] == [layer.methods for layer in one.layers]


def test_batches_are_dealt_in_turn() -> None:
    assert [list(ProcessGroup(rank, 3).shard(range(7))) for rank in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [ProcessGroup(rank, 3).local_indices(2, 6) for rank in range(3)] == [range(1, 2), range(1, 2), range(2)]
    assert SINGLE_PROCESS.local_indices(2, 6) == range(2, 6)
    with pytest.raises(RegroupError, match="more processes than batches") as caught:
        ProcessGroup(0, 3).shard([1, 2])
    assert "at most 2 processes" in str(caught.value)


def test_one_process_exchanges_nothing(
    text: Path, parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an exchange in a process that is alone")

    for name in ("init_process_group", "all_gather_object", "all_reduce", "broadcast_object_list", "barrier"):
        monkeypatch.setattr(dist, name, never)
    words = ("--calibration", text, *WORDS, "--device", "cpu", "--repair", "distill")
    status, _, err = run("convert", parent, tmp_path / "child", *words)
    assert status == 0, err
    # The sums are handed on as they are.
    sums = {"gram": torch.ones(2)}
    assert SINGLE_PROCESS.sum_tensors(sums)["gram"] is sums["gram"]


def test_half_of_a_launchers_environment_is_refused(
    parent: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        status, _, err = run("convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none")
        assert status == 2
        assert ("the processes cannot find each other" in err) == said
    assert not (tmp_path / "child").exists()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert ProcessGroup(5, 8).device(None) == ProcessGroup(5, 8).device("cuda") == "cuda:1"
    assert ProcessGroup(5, 8).device("cuda:0") == "cuda:0"
    assert SINGLE_PROCESS.device(None) is None
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(RegroupError, match="more processes than GPUs"):
        ProcessGroup(2, 4).device(None)
