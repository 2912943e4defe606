"""`regroup advise` from end to end: plans that convert takes, limits, records of benchmarks, bad input."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import runs
import tiny
from helpers import load_recipe, refused, run
from regroup.advice.hardware import KNOWN
from regroup.advice.run import advise
from regroup.conversion.plan import plan as plan_checkpoint
from regroup.errors import RegroupError
from regroup.plans import CalibrationText

GIVEN: dict[str, Any] = {"hardware": "l4", "context": 32, "batch": 4, "dtype": "float32"}


def options(*more: object) -> tuple[object, ...]:
    return ("--hardware", "l4", "--context", 32, "--batch", 4, "--dtype", "float32", *more)


@pytest.fixture
def text(tmp_path: Path) -> CalibrationText:
    train, _ = runs.text(tmp_path)
    return CalibrationText(train, 512, 32, 4)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rates of this machine that nobody looks at are measured badly and quickly."""
    for name, value in (("_SECONDS", 0.005), ("_MOST_SECONDS", 0.1), ("_READ_BYTES", 32 << 20)):
        monkeypatch.setattr(f"regroup.bench.machine.{name}", value)


def test_plans_have_the_cache_of_their_budget(tmp_path: Path, text: CalibrationText) -> None:
    source, _ = runs.pair(tmp_path)
    found = advise(str(source), calibration=text, max_loss=10.0, **GIVEN)
    names = [one.name for one in found.predictions]
    assert names[0] == "the original model"
    assert {"3 KV heads", "2 KV heads", "1 KV head"} <= set(names)
    assert found.predictions[0].loss == 0.0
    assert found.plan is not None
    # The fastest is multi-query attention, for the limit is none.
    assert found.chosen.name == "1 KV head"
    # An independent route to the plan by layer in the same cache.
    one = next((p for p in found.predictions if p.name == "by layer, as 3 KV heads"), None)
    if one is not None:
        plan, _ = plan_checkpoint(source, kv_budget="50%", calibration=text)
        assert {layer.name: layer.num_key_value_heads for layer in plan.layers} == one.heads
        recovery = found.record["results"]["recovery"]
        alone = sum(layer.predicted_kl or 0 for layer in plan.layers)
        # A plan is chosen on half of the held-out text, and its own loss measured on the other half.
        assert one.loss == pytest.approx(alone * recovery["additivity"], rel=0.2)
    # In the same cache the plan by layer never loses more.
    for p in found.predictions:
        if p.name.startswith("by layer"):
            same = next(q for q in found.predictions if q.name == p.name.removeprefix("by layer, as "))
            assert p.cache_bytes <= same.cache_bytes
            assert (p.loss or 0) <= (same.loss or 0)


def test_convert_accepts_the_plan(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    train, _ = runs.text(tmp_path)
    flags = ("--calibration", train, "--calibration-tokens", 512, "--calibration-window", 32)
    plan, record, figure = (tmp_path / name for name in ("plan.json", "record.json", "front.png"))
    status, out, message = run(
        "advise",
        source,
        *options("--max-loss", 10, "--uptrain-tokens", "100k", "-o", plan, "--record", record, "--figure", figure),
        *flags,
    )
    assert status == 0, message
    command = next(line for line in out.splitlines() if line.startswith("regroup convert"))
    assert "--calibration-window 32" in command
    assert json.loads(record.read_text())["kind"] == "advise"
    assert figure.stat().st_size > 5000
    status, _, message = run("convert", source, tmp_path / "advised", "--plan", plan, *flags)
    assert status == 0, message
    assert json.loads((tmp_path / "advised/config.json").read_text())["num_key_value_heads"] == 1


def test_uptraining_reduces_the_loss_and_its_error_is_stated(tmp_path: Path, text: CalibrationText) -> None:
    source, _ = runs.pair(tmp_path)
    few, many = (
        advise(str(source), calibration=text, uptrain_tokens=tokens, **GIVEN).predictions[-1]
        for tokens in (10_000, 10_000_000)
    )
    for one in (few, many):
        assert one.loss is not None
        assert one.loss_after is not None
        assert 0 < (one.loss_after_low or 0) < one.loss_after < (one.loss_after_high or 0)
        assert one.loss_after < one.loss
    assert (many.loss_after or 0) < (few.loss_after or 0)


def test_weights_alone_give_a_ranking_without_loss(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    found = advise(str(source), **GIVEN)
    energies = {one.name: one.energy for one in found.predictions}
    assert energies["the original model"] == 0.0
    assert all(one.loss is None for one in found.predictions)
    assert 0 < (energies["3 KV heads"] or 0) < (energies["2 KV heads"] or 0) < (energies["1 KV head"] or 0)


@pytest.mark.usefixtures("quick")
def test_a_bench_record_makes_floors_predictions(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    bench = tmp_path / "bench.json"
    status, _, message = run(
        "bench", "decode", source, "--kv-heads", "6,1", "--batch", 2, "--prompt", 16, "--new", 4, "-o", bench
    )
    assert status == 0, message
    given = {**GIVEN, "hardware": "this"}
    found = advise(str(source), bench=[bench], **given)
    assert found.record["results"]["efficiency"]["measured"]
    # What was measured just so is not predicted.
    measured = json.loads(bench.read_text())["results"]["models"]
    same = advise(str(source), bench=[bench], **{**given, "batch": 2, "context": 16})
    for one in measured:
        mine = next(p for p in same.predictions if p.kv_heads == one["kv_heads"])
        assert 1e3 * mine.token_seconds == pytest.approx(one["regroup"]["token_ms"]["p50"])


@pytest.mark.usefixtures("quick")
def test_measured_and_predicted_times_are_consistent(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    bench = tmp_path / "bench.json"
    run("bench", "decode", source, "--kv-heads", "6,2", "--batch", 2, "--prompt", 30, "--new", 4, "-o", bench)
    whole = json.loads(bench.read_text())
    for model, took in zip(whole["results"]["models"], (3.0, 5.0), strict=True):  # noise: less cache, and slower
        model["regroup"]["token_ms"]["p50"] = took
    bench.write_text(json.dumps(whole | {"machine": {"processor": "Abacus 9000"}}))
    given = {**GIVEN, "hardware": "this", "batch": 2}
    found = advise(str(source), bench=[bench], **given)
    times = {one.name: 1e3 * one.token_seconds for one in found.predictions}
    assert times["the original model"] == pytest.approx(3.0)
    assert times["2 KV heads"] == pytest.approx(5.0)
    assert 3.0 < times["3 KV heads"] < 5.0
    assert 0.5 < times["1 KV head"] / times["2 KV heads"] < 1.0
    for name in times:  # equal caches
        if name.startswith("by layer"):
            same = {p.name: p.cache_bytes for p in found.predictions}
            other = name.removeprefix("by layer, as ")
            assert same[name] < same[other] or times[name] == pytest.approx(times[other])
    assert any("Abacus 9000" in line for line in found.assumptions)
    # Negative control: of other settings nothing is taken, and the parts of a step are fitted.
    for other in ({"context": 20}, {"batch": 3}, {"dtype": "bfloat16"}, {"tensor_parallel": 2}):
        apart = advise(str(source), bench=[bench], **{**given, **other})
        assert 1e3 * apart.predictions[0].token_seconds != pytest.approx(3.0)
    status, out, message = run(
        "advise", source, "--hardware", "this", "--context", 32, "--batch", 2, "--dtype", "float32", "--bench", bench
    )
    assert status == 0, message
    if found.choice.prediction.token_seconds > 3e-3:
        assert re.search(r"3\.00 → .* ms per token, 1\.\d\d times slower", out)


def test_a_step_reads_the_whole_context(tmp_path: Path) -> None:
    """Time and memory are of one moment, the last token's; what an encoder-decoder makes is nothing to others."""
    source, _ = runs.pair(tmp_path)
    config = json.loads((source / "config.json").read_text())
    # A batch so large that the cache is all that a step reads, and a processor so fast that reading is all it does.
    given = {**GIVEN, "batch": 10**9, "memory_bytes": 10**30}
    one = advise(str(source), **given).predictions[0]
    layers, width = config["num_hidden_layers"], config["num_key_value_heads"] * config["head_dim"]
    assert one.cache_bytes == 2 * layers * width * 32 * 4 * 10**9
    rates = KNOWN["l4"]
    flops = 4 * layers * config["num_attention_heads"] * config["head_dim"] * 32 * 10**9
    attention = max(one.cache_bytes / rates.bandwidth, flops / rates.rate("float32"))
    weights = advise(str(source), **{**given, "context": 2}).predictions[0].token_seconds
    assert one.token_seconds - weights == pytest.approx(attention * 30 / 32, rel=1e-6)
    assert advise(str(source), **given, new=3).predictions[0].token_seconds == one.token_seconds


@pytest.mark.usefixtures("quick")
def test_a_batch_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """Rates of products with a billion rows are those of many rows, and not allocated."""
    source, _ = runs.pair(tmp_path)
    given = {**GIVEN, "hardware": "this", "batch": 10**9}
    assert advise(str(source), **given, memory_bytes=10**30).predictions[0].largest_batch > 10**9
    with pytest.raises(RegroupError, match="is within the limits"):
        advise(str(source), **given)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--hardware", "h1000"), ("not in the table", "h100")),
        (("--max-loss", 0.1), ("needs text", "--calibration")),
        (("--uptrain-tokens", "1M"), ("needs text", "--calibration")),
        (("--context", tiny.MAX_POSITIONS + 1), ("more positions", "lower --context")),
        (("--memory", 1e-9), ("is within the limits", "at best")),
        (("--max-time", 1e-9), ("is within the limits", " ms per token, with 1 KV head")),
        (("--dtype", "int3"), ("dtype",)),
        (("--memory", 0), ("is within the limits", "at best a batch of 0")),
        (("--memory", "inf"), ("not a number of GB",)),
        (("--max-time", 0), ("is within the limits",)),
    ],
)
def test_impossible_requests_are_refused(more: tuple[object, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    message = refused("advise", source, *options(*more, "-o", tmp_path / "plan.json"))
    for word in words:
        assert word in message
    assert not (tmp_path / "plan.json").exists()


def test_records_of_other_things_are_refused(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    other = tmp_path / "record.json"
    for value, words in (
        ({"kind": "evaluate/task", "format": 1}, "evaluate/task"),
        ({"kind": "benchmark/decode", "format": 9}, "format 9"),
        ({"kind": "benchmark/decode", "format": 1, "configuration": {}, "results": {}}, "is incomplete"),
    ):
        other.write_text(json.dumps(value))
        assert words in refused("advise", source, *options("--bench", other))


@pytest.mark.usefixtures("quick")
def test_damaged_records_of_decoding_are_refused(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    bench = tmp_path / "bench.json"
    run("bench", "decode", source, "--kv-heads", "6", "--batch", 2, "--prompt", 16, "--new", 4, "-o", bench)
    whole = json.loads(bench.read_text())
    assert "other hardware" in refused("advise", source, *options("--bench", bench))
    this = ("--hardware", "this", "--context", 32, "--batch", 4, "--dtype", "float32", "--bench", bench)
    assert run("advise", source, *this)[0] == 0
    for value in (0, -1, math.nan, math.inf, "1", None, 10**400):
        damaged = json.loads(json.dumps(whole))
        damaged["results"]["models"][0]["regroup"]["token_ms"]["p50"] = value
        bench.write_text(json.dumps(damaged))
        assert "is incomplete" in refused("advise", source, *this)
    for name, value in (("config", "x"), ("config", []), ("prompt", 1.5), ("batch", 10**400), ("batch", "2")):
        bench.write_text(json.dumps({**whole, "configuration": {**whole["configuration"], name: value}}))
        refused("advise", source, *this)
    bench.write_text(json.dumps({**whole, "results": {**whole["results"], "models": []}}))
    assert "is incomplete" in refused("advise", source, *this)


def test_a_config_alone_gets_the_conventional_number(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    config, plan, record, figure = (tmp_path / name for name in ("config.json", "plan.json", "record.json", "f.png"))
    config.write_bytes((source / "config.json").read_bytes())
    found = advise(str(config), **GIVEN)
    # Half of six, for nothing is known of the loss, and there are no more than eight.
    assert (found.chosen.name, found.choice.reason, found.rests_on) == ("3 KV heads", "convention", "config")
    # A byte less than it needs.
    short = {**GIVEN, "memory_bytes": found.chosen.memory_bytes - 1}
    assert advise(str(config), **short).chosen.name == "2 KV heads"
    # Nothing is written where the figure cannot be.
    for file in (plan, record):
        file.write_text("before")
    assert "no loss to draw" in refused("advise", config, *options("-o", plan, "--record", record, "--figure", figure))
    assert (plan.read_text(), record.read_text(), figure.exists()) == ("before", "before", False)
    status, out, message = run("advise", config, *options("-o", plan))
    assert status == 0
    assert f"wrote {plan}" in message
    assert {layer["num_key_value_heads"] for layer in json.loads(plan.read_text())["layers"]} == {3}
    for words in ("conventional choice", "not known", "cannot be estimated from a config"):
        assert words in out


def test_without_a_limit_the_knee_is_recommended(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    train, _ = runs.text(tmp_path)
    flags = ("--calibration", train, "--calibration-tokens", 512, "--calibration-window", 32)
    file = tmp_path / "record.json"
    status, out, message = run("advise", source, *options("--record", file), *flags)
    assert status == 0, message
    results = json.loads(file.read_text())["results"]
    rows = {row["name"]: row for row in results["candidates"]}
    chosen, original = rows[results["chosen"]], rows["the original model"]
    assert results["chosen"] != "the original model"
    assert (results["reason"], results["loss_rests_on"]) in (("knee", "text"), ("no knee", "text"))
    said = {line.split(":")[0].strip(): line for line in out.splitlines() if line.startswith("  ") and ":" in line}
    ratio = original["cache_bytes"] / chosen["cache_bytes"]
    assert f"in float32, {ratio:.1f} times smaller" in said["cache"]
    assert f"{original['largest_batch']:,} → {chosen['largest_batch']:,} fit" in said["sequences"]
    assert f"{chosen['loss']:+.3f} nats per token" in said["loss"]
    assert f"perplexity {math.exp(chosen['loss']) - 1:+,.1%}" in said["loss"]
    assert "512 tokens of calibration text" in said["certainty"]
    # With a limit the answer may be to leave it; the control that the question is another one.
    status, out, message = run("advise", source, *options("--max-loss", 0), *flags)
    assert status == 0, message
    assert "leave the model as it is" in out


def test_a_multi_query_model_is_left_unchanged(tmp_path: Path) -> None:
    _, converted = runs.pair(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads((converted / "config.json").read_text()) | {"num_key_value_heads": 1}))
    status, out, message = run("advise", config, *options())
    assert status == 0, message
    assert "it has no KV heads to share" in out


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> list[Any]:
    """Rates that differ at random each time that they are measured, as on a machine that others use too."""
    draw, asked = random.Random(request.node.name), []

    def product(rows: int, inner: int, *, dtype: Any, device: Any) -> Any:
        asked.append((str(dtype), rows, inner))
        return SimpleNamespace(median=draw.uniform(1e5, 1e7))

    monkeypatch.setattr("regroup.advice.measured.product_rate", product)
    monkeypatch.setattr("regroup.advice.measured.read_bandwidth", lambda *_, **__: SimpleNamespace(median=1e6))
    return asked


@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_each_rate_is_measured_once(tmp_path: Path, rates: list[Any], dtype: str | None) -> None:
    source, _ = runs.pair(tmp_path)
    found = advise(str(source), **{**GIVEN, "hardware": "this", "dtype": dtype})
    assert len(found.predictions) > 3
    assert len(rates) == len(set(rates))
    assert {name for name, _, _ in rates} == (
        {"torch.bfloat16", "torch.float32"} if dtype is None else {f"torch.{dtype}"}
    )
    # In a dtype: the batch, the prompt, and attention with the fewest and the most queries for a KV head.
    assert len(rates) == (8 if dtype is None else 4)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("batch", [1, 4, 64])
def test_less_cache_is_never_slower_and_equal_cache_equally_fast(
    tmp_path: Path, rates: list[Any], seed: int, batch: int
) -> None:
    source, _ = runs.pair(tmp_path)
    found = advise(str(source), **{**GIVEN, "hardware": "this", "batch": batch, "memory_bytes": 10**12})
    pairs = sorted((one.cache_bytes, one.token_seconds) for one in found.predictions)
    assert len({cache for cache, _ in pairs}) > 2
    for (cache, seconds), (more, longer) in itertools.pairwise(pairs):
        assert seconds <= longer
        assert cache != more or seconds == longer


def test_the_fastest_dtype_is_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: list[Any]) -> None:
    source, _ = runs.pair(tmp_path)
    given = {**GIVEN, "hardware": "this", "dtype": None}
    for slow, wanted in ((torch.bfloat16, "float32"), (torch.float32, "bfloat16")):

        def product(rows: int, inner: int, *, dtype: Any, device: Any, slow: Any = slow) -> Any:
            return SimpleNamespace(median=1e3 if dtype == slow else 1e9)

        monkeypatch.setattr("regroup.advice.measured.product_rate", product)
        monkeypatch.setattr("regroup.advice.measured._multiplies_bfloat16", lambda: False)
        found = advise(str(source), **given)
        assert found.setting.dtype == wanted
        assert any(line.startswith(f"dtype {wanted}, chosen because") for line in found.assumptions)
        assert any("emulated" in line for line in found.assumptions) == (wanted == "float32")
        assert found.record["configuration"]["dtype"] == wanted
    # Of hardware from the table it is what such hardware is made for.
    assert advise(str(source), **{**GIVEN, "dtype": None}).setting.dtype == "bfloat16"


def test_files_of_one_run_do_not_overwrite_each_other(tmp_path: Path) -> None:
    source, _ = runs.pair(tmp_path)
    same = tmp_path / "same.json"
    for first, second in (("-o", "--record"), ("-o", "--figure"), ("--record", "--figure"), ("--bench", "--record")):
        assert "overwrite" in refused("advise", source, *options(first, same, second, same))
    assert not same.exists()


def test_the_recovery_fit_is_that_of_the_records(monkeypatch: pytest.MonkeyPatch) -> None:
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
