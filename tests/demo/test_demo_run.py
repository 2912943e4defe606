"""The demonstration on a small scale: its parts fit together, and its texts do not overlap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from regroup.data import causal_batches
from regroup.demo import recovery
from regroup.demo import run as demo_run
from regroup.demo.corpus import held_out_text, training_text
from regroup.demo.figure import draw
from regroup.evaluation import score
from regroup.uptraining.recipe import Recipe


def lines(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_texts_are_divided_by_module(tmp_path: Path) -> None:
    texts = recovery.divide(tmp_path / "new", training_text(), held_out_text(), len, 100_000)
    calibration, training, held_out = (lines(path) for path in (texts.calibration, texts.training, texts.held_out))
    assert calibration + training == [text for _, text in training_text()]
    assert held_out == [text for _, text in held_out_text()]
    assert sum(map(len, calibration[:-1])) < 100_000 <= sum(map(len, calibration))
    # Empty modules are alike.
    assert not set(filter(None, calibration)) & set(training)
    assert not set(filter(None, held_out)) & set(calibration + training)


def test_a_curve_is_told_in_shares_of_the_parent() -> None:
    history = [{"step": 0, "eval_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "eval_loss": 2.0}]
    record = {"configuration": {"budget": {"tokens_per_step": 100}}, "results": {"history": history}}
    assert recovery.points(record, 4000) == [
        {"alpha": 0.0, "nats_per_token": 3.0},
        {"alpha": 0.05, "nats_per_token": 2.0},
    ]


def test_a_parent_that_remembers_answers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    converted, original = tiny.build("llama_grouped"), tiny.build("llama")
    calls: list[int] = []
    right = original.forward

    def forward(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        return right(*arguments, **options)

    monkeypatch.setattr(original, "forward", forward)
    first, other = (tiny.inputs("llama", 5, 12, seed=seed)["input_ids"] for seed in (0, 1))
    wanted = score(converted, causal_batches(first, 2), teacher=original)
    assert len(calls) == 3
    remembered = demo_run.CachedModel(original)
    found = [score(converted, causal_batches(first, 2), teacher=remembered) for _ in range(3)]
    assert found == [wanted] * 3
    assert len(calls) == 6
    own = score(remembered, causal_batches(first, 2))
    assert own.nats_per_token == pytest.approx(wanted.teacher_nats_per_token, rel=1e-12)
    assert len(calls) == 6
    assert score(converted, causal_batches(other, 2), teacher=remembered) != wanted
    assert len(calls) == 9


def test_the_whole_demonstration_on_a_small_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recovery, "ALPHA", 0.0012)
    monkeypatch.setattr(recovery, "HELD_OUT_WINDOWS", 4)
    monkeypatch.setattr(demo_run, "CALIBRATION_TOKENS", 4096)
    monkeypatch.setattr(demo_run, "KV_HEADS", (2,))
    monkeypatch.setattr(demo_run, "METHODS", ("mean", "auto + text"))
    (tmp_path / "uptrained-ours").mkdir()
    value = demo_run.run_demo(tmp_path, windows=4)
    original, mean, auto = value["results"]["rows"]
    assert [row["method"] for row in (original, mean, auto)] == ["parent", "mean", "auto + text"]
    assert original["excess_nats_per_token"] == 0
    assert auto["excess_nats_per_token"] < mean["excess_nats_per_token"]
    paper, ours = value["results"]["uptrained"]
    # Four steps of 2,048 tokens, rounded up from α of 6.55 million.
    assert paper["uptraining_tokens"] == ours["uptraining_tokens"] == 8192
    assert paper["excess_nats_per_token"] < mean["excess_nats_per_token"]
    assert ours["excess_nats_per_token"] < auto["excess_nats_per_token"]
    assert ours["flops"] > 1.2 * paper["flops"]
    assert paper["parent_on_the_curve"] == ours["parent_on_the_curve"]
    assert [point["alpha"] for point in paper["curve"]][:2] == [0.0, pytest.approx(2048 / 6_553_600)]
    assert json.loads((tmp_path / "demo.json").read_text(encoding="utf-8"))["results"]["uptrained"] == [paper, ours]
    assert (tmp_path / "demo.png").read_bytes()[:4] == b"\x89PNG"
    draw(value, tmp_path / "again.png")
    said = capsys.readouterr().out
    assert "paper's recipe" in said
    assert "ours, distilled" in said


def test_both_ways_see_the_same_text_in_the_same_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Recipe] = []

    class SeenError(Exception):
        pass

    def stop(recipe: Recipe, **_: object) -> None:
        seen.append(recipe)
        raise SeenError

    monkeypatch.setattr(recovery, "uptrain", stop)
    texts = recovery.Texts(tmp_path / "c", tmp_path / "t", tmp_path / "h")
    for way in recovery.WAYS:
        with pytest.raises(SeenError):
            recovery.recover(way, tmp_path, tmp_path, texts, tmp_path / "run", pretraining_tokens=10**6, window=256)
    paper, ours = seen
    assert paper.data == ours.data == (str(tmp_path / "t"),)
    assert (paper.alpha, paper.seed, paper.batch_size, paper.window) == (
        *(ours.alpha, ours.seed, ours.batch_size, ours.window),
    )
    assert (paper.teacher, ours.teacher) == (None, str(tmp_path))
