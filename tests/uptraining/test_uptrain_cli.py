"""``regroup uptrain`` as a command: what it prints, what it refuses, and that it takes every setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import everything, refused, run


def options(shop: Path, output: Path, *more: object) -> list[object]:
    return [shop / "child", "--data", shop / "train.txt", "-o", output, "--window", 32, "--device", "cpu", *more]


def test_a_dry_run_prints_the_arithmetic_and_writes_nothing(shop: Path, tmp_path: Path) -> None:
    share = ("--alpha", 0.05, "--pretraining-tokens", "102400")
    status, out, message = run("uptrain", *options(shop, tmp_path / "run", "--dry-run", *share))
    assert (status, out) == (0, ""), message
    for words in ("5,120 tokens", "20 steps", "FLOPs", "adamw", "cosine", "nothing was written", "run/model"):
        assert words in message
    assert everything(tmp_path) == []


def test_a_run_and_its_end(shop: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"report-to: []\nlearning-rate: 1e-3\nsteps: 9\ndata: ['{shop / 'no-such-file'}']\n")
    more = ("--recipe", recipe, "--steps", 10, "--teacher", shop / "parent")
    given = options(shop, tmp_path / "run", *more, "--held-out", shop / "held-out.txt")
    status, _, message = run("uptrain", *given)
    assert status == 0, message
    assert "held-out" in message
    assert "record.json and curve.png" in message
    assert "finished already" in run("uptrain", *given)[2]
    assert "teacher_nats" in run("evaluate", tmp_path / "run/model", "--data", shop / "held-out.txt", "--window", 32,
                                 "--teacher", shop / "parent")[1]  # fmt: skip


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ((), ("--alpha", "--tokens", "--steps")),
        (("--alpha", 0.05), ("--pretraining-tokens",)),
        (("--steps", 2, "--tokens", "1k"), ("remedy:",)),
        (("--steps", 2, "--hidden-weight", 1), ("without a teacher", "--teacher")),
        (("--steps", 2, "--optimizer", "sgd"), ("optimizer", "adamw")),
        (("--steps", 2, "--top-k", 4), ("without a teacher",)),
        (("--steps", 2, "--fsdp"), ("nothing to shard over", "torchrun")),
        (("--steps", 2, "--objective", "span-corruption"), ("objective is for another kind",)),
        (("--steps", 2, "--held-out", "nowhere.txt"), ("nowhere.txt",)),
    ],
)
def test_impossible_requests(more: tuple[object, ...], words: tuple[str, ...], shop: Path, tmp_path: Path) -> None:
    message = refused("uptrain", *options(shop, tmp_path / "run", *more))
    assert [word for word in words if word not in message] == []
    assert everything(tmp_path) == []


def test_empty_data_is_refused(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    given = ("--data", tmp_path / "empty.txt", "-o", tmp_path / "run", "--steps", 1, "--window", 32)
    message = refused("uptrain", shop / "child", *given)
    assert "empty" in message
    assert not (tmp_path / "run").exists()


def test_nothing_at_all_is_refused() -> None:
    assert "model, output, data" in refused("uptrain")
