"""Runs that would end without having learned anything, runs that are interrupted, and where they report to."""

from __future__ import annotations

import gzip
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

import runs
from helpers import refused, run, tensors
from regroup.errors import RegroupError
from regroup.uptraining import checks, states
from regroup.uptraining.learning import NothingLearnedError
from regroup.uptraining.run import uptrain
from regroup.uptraining.schedule import SCHEDULES, schedule
from regroup.uptraining.trainer import UptrainTrainer

Write = Callable[[Path, str], Path]


def as_lines(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl").write_text((json.dumps({"text": text}) + "\n") * 600)
    return folder / "rows.jsonl"


def as_gzip(folder: Path, text: str) -> Path:
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(((json.dumps({"text": text}) + "\n") * 600).encode()))
    return folder / "rows.jsonl.gz"


def as_table(folder: Path, text: str) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": [text] * 600}), folder / "rows.parquet")
    return folder / "rows.parquet"


def as_folder(folder: Path, text: str) -> Path:
    (folder / "many").mkdir()
    as_lines(folder / "many", text)
    as_table(folder / "many", text)
    return folder / "many"


def as_special_tokens(folder: Path, text: str) -> Path:
    (folder / "text.txt").write_text((text or "<s></s>") * 600)
    return folder / "text.txt"


@pytest.mark.parametrize("write", [as_lines, as_gzip, as_table, as_folder, as_special_tokens])
def test_rows_without_text_are_refused_and_leave_nothing(write: Write, shop: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    given = ("--steps", 1, "--window", 32, "--device", "cpu")
    data = write(tmp_path / "empty", "")
    message = refused("uptrain", shop / "child", "--data", data, "-o", tmp_path / "run", *given)
    assert "no tokens to learn from" in message
    assert str(data) in message
    assert not (tmp_path / "run").exists()
    # The control: the same rows with a few words.
    (tmp_path / "full").mkdir()
    data = write(tmp_path / "full", "the cat sat on the mat")
    status, _, message = run("uptrain", shop / "child", "--data", data, "-o", tmp_path / "run", *given, "--dry-run")
    assert status == 0, message


def test_pairs_without_text_are_refused(tmp_path: Path) -> None:
    runs.pair(tmp_path, "t5", "some")
    given = ("-o", tmp_path / "run", "--objective", "pairs", "--steps", 1, "--window", 16, "--device", "cpu")
    for target, fits in (("", False), ("cat", True)):
        rows = json.dumps({"source": target, "target": target}) + "\n"
        (tmp_path / "pairs.jsonl").write_text(rows * 30)
        status, _, message = run("uptrain", tmp_path / "child", "--data", tmp_path / "pairs.jsonl", *given, "--dry-run")
        assert status == (0 if fits else 2), message
        assert ("no tokens to learn from" in message) != fits


def test_labels_that_are_all_masked_are_refused(tmp_path: Path) -> None:
    """Windows of two tokens, the second of which always begins a document."""
    runs.pair(tmp_path)
    (tmp_path / "train.txt").write_text("x")
    runs.recipe(tmp_path)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": ""}) + "\n" + (json.dumps({"text": ""}) + "\n") * 99)
    given = {"data": (str(tmp_path / "rows.jsonl"),), "window": 2, "steps": 1}
    with pytest.raises(RegroupError, match="no tokens to learn from"):
        uptrain(runs.recipe(tmp_path, **given))
    assert not (tmp_path / "run").exists()


def test_less_data_than_a_step_is_refused(shop: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("the cat sat on the mat; " * 25)
    given = ("--data", tmp_path / "short.txt", "-o", tmp_path / "run", "--steps", 1, "--window", 32, "--device", "cpu")
    message = refused("uptrain", shop / "child", *given, "--batch-size", 64)
    assert "the data end before the first step" in message
    assert "at least 64 windows of 32 tokens" in message
    assert not (tmp_path / "run").exists()
    status, _, message = run("uptrain", shop / "child", *given, "--batch-size", 2)
    assert status == 0, message
    record = json.loads((tmp_path / "run/record.json").read_text())
    assert record["results"]["steps"] == 1


def test_a_training_that_changes_nothing_is_refused(shop: Path, tmp_path: Path) -> None:
    """A rate so small that no float32 notices."""
    given = {
        "output": tmp_path / "run",
        "learning_rate": 1e-30,
        "weight_decay": 0.0,
        "steps": 2,
        "save_every": 1,
    }
    for _ in range(2):  # what was saved on the way is not finished by a second call
        with pytest.raises(NothingLearnedError, match="changed no weight"):
            uptrain(runs.recipe(shop, **given))
        assert not (tmp_path / "run").exists()
    # The control.
    done = uptrain(runs.recipe(shop, **{**given, "learning_rate": 1e-3}))
    assert done.model is not None
    before, after = tensors(shop / "child"), tensors(done.model)
    assert any(not torch.equal(after[name], value) for name, value in before.items())


def test_a_run_that_is_forgotten_leaves_only_what_is_not_its_own(tmp_path: Path) -> None:
    for output, kept in ((tmp_path / "one", []), (tmp_path / "two", ["notes.txt"])):
        for name in ("own/00000000.npy", "logs/events", "run.json", *kept):
            (output / name).parent.mkdir(parents=True, exist_ok=True)
            (output / name).write_text("{}")
        states.forget(output)
        assert output.exists() == bool(kept)
        assert [path.name for path in output.glob("*")] == kept


def test_a_finished_run_says_that_nothing_was_done(shop: Path, tmp_path: Path) -> None:
    given = ("--data", shop / "train.txt", "-o", tmp_path / "run", "--steps", 1, "--window", 32, "--device", "cpu")
    assert "wrote" in run("uptrain", shop / "child", *given)[2]
    status, _, message = run("uptrain", shop / "child", *given)
    assert status == 0
    assert "nothing was done" in message
    assert "wrote" not in message


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_step_has_a_rate_of_zero(name: str) -> None:
    for steps in (1, 2, 3, 7, 100):
        for warmup in (0.0, 0.05, 0.5, 1.0):
            for decay in (0.0, 0.2, 1.0):
                factor = schedule(name, steps, warmup=warmup, decay=decay, original_steps=10)
                assert min(factor(step) for step in range(steps)) > 0, (steps, warmup, decay)


# ---- where it reports to ---------------------------------------------------------------------------------------------


def test_backends_that_are_not_installed_are_refused_by_package(
    shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    monkeypatch.setattr(checks, "_installed", lambda module: False)
    recipe = tmp_path / "recipe.yaml"
    given = ("--data", shop / "train.txt", "-o", tmp_path / "run", "--steps", 1, "--window", 32, "--recipe", recipe)
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb"), ("comet_ml", "comet-ml")):
        recipe.write_text(f"report-to: {name}\n")
        message = refused("uptrain", shop / "child", *given)
        assert f"pip install {package}" in message
        assert not (tmp_path / "run").exists()
    recipe.write_text("report-to: tensorbord\n")
    assert "report_to: tensorboard" in refused("uptrain", shop / "child", *given)
    # Whatever the installed transformers reports to is refused by name where it is not there.
    for name in INTEGRATION_TO_CALLBACK:
        recipe.write_text(f"report-to: {name}\n")
        assert f"report_to: {name}" in refused("uptrain", shop / "child", *given)
    recipe.write_text("report-to: none\n")
    assert run("uptrain", shop / "child", *given, "--dry-run")[0] == 0


# ---- interruptions ---------------------------------------------------------------------------------------------------


def interrupted_at(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    observe = UptrainTrainer._observe

    def stop(trainer: UptrainTrainer) -> Any:
        if trainer.state.global_step + 1 == step:
            raise KeyboardInterrupt
        return observe(trainer)

    monkeypatch.setattr(UptrainTrainer, "_observe", stop)


@pytest.mark.parametrize(("step", "saved"), [(2, None), (5, 4), (7, 6)])
def test_an_interruption_says_what_is_kept_and_what_resumes(
    step: int, saved: int | None, shop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "my run $(x)"
    words = ["uptrain", shop / "child", "--data", shop / "train.txt", "-o", output, "--window", 32]
    words = [str(word) for word in (*words, "--steps", 8, "--save-every", 2, "--device", "cpu")]
    monkeypatch.setattr(sys, "argv", ["/usr/bin/regroup", *words, "--no-resume"])
    with monkeypatch.context() as patch:
        interrupted_at(patch, step)
        message = refused(*words)
    assert "no incomplete result" not in message
    command = shlex.join(["regroup", *words])
    assert command in message
    if saved is None:
        assert "before a state was saved" in message
        assert states.complete(output) == []
    else:
        assert f"the state after step {saved} is kept" in message
        assert str(output / f"checkpoint-{saved}") in message
    # What it says is true: that command, taken apart as a shell does, finishes the run.
    status, _, message = run(*shlex.split(command)[1:])
    assert status == 0, message
    assert (saved is not None) == ("resuming from step" in message)
    assert (output / "model/config.json").is_file()


def test_an_interruption_of_both_in_one_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.pair(tmp_path)
    train, _ = runs.text(tmp_path)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"steps: 4\nwindow: 32\nreport-to: []\ndevice: cpu\nsave-every: 2\ndata: ['{train}']\n")
    words = ["convert", tmp_path / "parent", tmp_path / "dst", "--kv-heads", 1, "--uptrain", recipe]
    for step, kept in ((1, "the conversion is complete and kept"), (3, "the state after step 2 is kept")):
        with monkeypatch.context() as patch:
            interrupted_at(patch, step)
            message = refused(*words)
        assert kept in message
        assert "resume from there with the same command" in message
    assert run(*words)[0] == 0


@pytest.mark.parametrize("kind", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_says_what_is_kept(kind: int, shop: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    given = [shop / "child", "--data", shop / "train.txt", "-o", output, "--window", 32, "--device", "cpu"]
    process = runs.start(*given, "--steps", 5000, "--batch-size", 1, "--save-every", 3)
    while process.poll() is None and not states.complete(output):
        time.sleep(0.01)
    process.send_signal(kind)
    _, message = process.communicate()
    assert process.returncode == 2, message
    assert "is kept" in message
    assert "Traceback" not in message
    assert "-m regroup.cli uptrain" in message
    assert any(str(folder) in message for _, folder in states.complete(output))
