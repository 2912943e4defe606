"""`regroup advise` from end to end: plans that convert takes, limits, records of benchmarks, bad input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import runs
import tiny
from helpers import load_recipe, refused, run
from regroup.advise.run import advise
from regroup.convert.text import CalibrationText
from regroup.planning import plan_checkpoint

GIVEN: dict[str, Any] = {"hardware_name": "l4", "context": 32, "batch": 4, "dtype": "float32"}


def options(*more: object) -> tuple[object, ...]:
    return ("--hardware", "l4", "--context", 32, "--batch", 4, "--dtype", "float32", *more)


@pytest.fixture
def text(tmp_path: Path) -> CalibrationText:
    train, _ = runs.text(tmp_path)
    return CalibrationText(train, 512, 32, 4)


def test_plans_cost_what_the_budget_says_they_do(tmp_path: Path, text: CalibrationText) -> None:
    parent, _ = runs.pair(tmp_path)
    found = advise(str(parent), calibration=text, max_loss=10.0, **GIVEN)
    names = [one.name for one in found.predictions]
    assert names[0] == "the parent"
    assert {"G = 3", "G = 2", "G = 1"} <= set(names)
    assert found.predictions[0].loss == 0.0
    assert found.plan is not None
    # The fastest is multi-query attention, for the limit is none.
    assert found.chosen.name == "G = 1"
    # An independent route to the plan by layer in the same cache.
    one = next((p for p in found.predictions if p.name == "by layer, as G = 3"), None)
    if one is not None:
        plan, _ = plan_checkpoint(parent, kv_budget="50%", calibration=text)
        assert {layer.name: layer.num_key_value_heads for layer in plan.layers} == one.heads
        recovery = found.record["results"]["recovery"]
        assert one.loss == pytest.approx((plan.predicted_kl or 0) * recovery["additivity"])
    # In the same cache the plan by layer never loses more.
    for p in found.predictions:
        if p.name.startswith("by layer"):
            same = next(q for q in found.predictions if q.name == p.name.removeprefix("by layer, as "))
            assert p.cache_bytes <= same.cache_bytes
            assert (p.loss or 0) <= (same.loss or 0)


def test_the_plan_is_one_that_convert_carries_out(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    train, _ = runs.text(tmp_path)
    flags = ("--calibration", train, "--calibration-tokens", 512, "--calibration-window", 32)
    plan, record, figure = (tmp_path / name for name in ("plan.json", "record.json", "front.png"))
    status, out, message = run(
        "advise",
        parent,
        *options("--max-loss", 10, "--uptrain-tokens", "100k", "-o", plan, "--record", record, "--figure", figure),
        *flags,
    )
    assert status == 0, message
    command = next(line for line in out.splitlines() if line.startswith("regroup convert"))
    assert "--calibration-window 32" in command
    assert json.loads(record.read_text())["kind"] == "advise"
    assert figure.stat().st_size > 5000
    status, _, message = run("convert", parent, tmp_path / "advised", "--plan", plan, *flags)
    assert status == 0, message
    assert json.loads((tmp_path / "advised/config.json").read_text())["num_key_value_heads"] == 1


def test_uptraining_leaves_less_and_says_how_sure(tmp_path: Path, text: CalibrationText) -> None:
    parent, _ = runs.pair(tmp_path)
    few, many = (
        advise(str(parent), calibration=text, uptrain_tokens=tokens, **GIVEN).predictions[-1]
        for tokens in (10_000, 10_000_000)
    )
    for one in (few, many):
        assert one.loss is not None
        assert one.loss_after is not None
        assert 0 < (one.loss_after_low or 0) < one.loss_after < (one.loss_after_high or 0)
        assert one.loss_after < one.loss
    assert (many.loss_after or 0) < (few.loss_after or 0)


def test_weights_alone_rank_and_know_no_loss(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    found = advise(str(parent), **GIVEN)
    energies = {one.name: one.energy for one in found.predictions}
    assert energies["the parent"] == 0.0
    assert all(one.loss is None for one in found.predictions)
    assert 0 < (energies["G = 3"] or 0) < (energies["G = 2"] or 0) < (energies["G = 1"] or 0)


def test_a_bench_record_makes_floors_predictions(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    bench = tmp_path / "bench.json"
    status, _, message = run(
        "bench", "decode", parent, "--kv-heads", "6,1", "--batch", 2, "--prompt", 16, "--new", 4, "-o", bench
    )
    assert status == 0, message
    given = {**GIVEN, "hardware_name": "this"}
    found = advise(str(parent), bench=[bench], **given)
    assert found.record["results"]["efficiency"]["measured"]
    # What was measured just so is not predicted.
    measured = json.loads(bench.read_text())["results"]["models"]
    same = advise(str(parent), bench=[bench], **{**given, "batch": 2, "context": 16})
    for one in measured:
        mine = next(p for p in same.predictions if p.kv_heads == one["kv_heads"])
        assert 1e3 * mine.token_seconds == pytest.approx(one["regroup"]["token_ms"]["p50"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--hardware", "h1000"), ("not in the table", "h100")),
        (("--max-loss", 0.1), ("needs text", "--calibration")),
        (("--uptrain-tokens", "1M"), ("needs text", "--calibration")),
        (("--context", tiny.MAX_POSITIONS + 1), ("more positions",)),
        (("--memory", 1e-9), ("keeps to the limits", "at best")),
        (("--max-time", 1e-9), ("keeps to the limits", "s a token, with G = 1")),
        (("--dtype", "int3"), ("dtype",)),
        (("--memory", 0), ("keeps to the limits", "at best a batch of 0")),
        (("--memory", "inf"), ("not a number of GB",)),
        (("--max-time", 0), ("keeps to the limits",)),
    ],
)
def test_what_cannot_be_advised_is_refused(more: tuple[object, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    message = refused("advise", parent, *options(*more, "-o", tmp_path / "plan.json"))
    for word in words:
        assert word in message
    assert not (tmp_path / "plan.json").exists()


def test_records_of_other_things_are_refused(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    other = tmp_path / "record.json"
    for value, words in (
        ({"kind": "evaluate/task", "format": 1}, "evaluate/task"),
        ({"kind": "benchmark/decode", "format": 9}, "format 9"),
        ({"kind": "benchmark/decode", "format": 1, "configuration": {}, "results": {}}, "lacks something"),
    ):
        other.write_text(json.dumps(value))
        assert words in refused("advise", parent, *options("--bench", other))


def test_damaged_records_of_decoding_are_refused(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    bench = tmp_path / "bench.json"
    run("bench", "decode", parent, "--kv-heads", "6", "--batch", 2, "--prompt", 16, "--new", 4, "-o", bench)
    whole = json.loads(bench.read_text())
    assert "other hardware" in refused("advise", parent, *options("--bench", bench))
    this = ("--hardware", "this", "--context", 32, "--batch", 4, "--dtype", "float32", "--bench", bench)
    assert run("advise", parent, *this)[0] == 0
    for value in (0, -1, math.nan, math.inf, "1", None, 10**400):
        damaged = json.loads(json.dumps(whole))
        damaged["results"]["models"][0]["regroup"]["token_ms"]["p50"] = value
        bench.write_text(json.dumps(damaged))
        assert "lacks something" in refused("advise", parent, *this)
    for name, value in (("config", "x"), ("config", []), ("prompt", 1.5), ("batch", 10**400), ("batch", "2")):
        bench.write_text(json.dumps({**whole, "configuration": {**whole["configuration"], name: value}}))
        refused("advise", parent, *this)
    bench.write_text(json.dumps({**whole, "results": {**whole["results"], "models": []}}))
    assert "lacks something" in refused("advise", parent, *this)


def test_a_config_alone_keeps_as_many_heads_as_fit(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    config, plan, record, figure = (tmp_path / name for name in ("config.json", "plan.json", "record.json", "f.png"))
    config.write_bytes((parent / "config.json").read_bytes())
    found = advise(str(config), **GIVEN)
    assert found.chosen.name == "the parent"
    # A byte less than the parent needs.
    short = {**GIVEN, "memory_bytes": found.predictions[0].memory_bytes - 1}
    assert advise(str(config), **short).chosen.name == "G = 3"
    # Nothing is written where the figure cannot be.
    for file in (plan, record):
        file.write_text("before")
    assert "no loss to draw" in refused("advise", config, *options("-o", plan, "--record", record, "--figure", figure))
    assert (plan.read_text(), record.read_text(), figure.exists()) == ("before", "before", False)
    status, _, message = run("advise", config, *options("-o", plan))
    assert status == 0
    assert "no plan is needed" in message
    assert plan.read_text() == "before"


def test_files_of_one_run_do_not_overwrite_each_other(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    same = tmp_path / "same.json"
    for first, second in (("-o", "--record"), ("-o", "--figure"), ("--record", "--figure"), ("--bench", "--record")):
        assert "overwrite" in refused("advise", parent, *options(first, same, second, same))
    assert not same.exists()


def test_what_is_extrapolated_with_comes_from_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("fit_recovery", monkeypatch)
    assert json.loads(recipe.FILE.read_text()) == recipe.made()


def test_kendall_counts_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    path = Path(__file__).parents[2] / "benchmarks/advise.py"
    spec = importlib.util.spec_from_file_location("advise_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.kendall([(1, 1), (2, 2), (3, 3)]) == 1.0
    assert module.kendall([(1, 3), (2, 2), (3, 1)]) == -1.0
    assert module.kendall([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)
