"""What a conversion cost on text that was not fitted: as by whole models, and pooling where that costs less."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import regroup
import texts
import tiny
from helpers import assert_same_tensors, carried_out, copy, digests, layout_of, on_text, run, tensors
from regroup.calibration import divergence, layer_regression
from regroup.calibration.layer_converter import LayerConverter
from regroup.calibration.layer_runner import LayerRunner
from regroup.calibration.quality import Quality, set_apart
from regroup.calibration.repair import Refit, Regression
from regroup.conversion import convert as convert_module
from regroup.errors import RegroupError
from regroup.listener import Listener
from regroup.plans import RESULT_FILE, Plan, make_plan
from regroup.verification import verify
from teams import batches

Saved = Callable[[str], Path]


class Heard(Listener):
    """Keeps what it is told of the quality."""

    def __init__(self) -> None:
        self.heard: list[tuple[Quality, bool]] = []

    def judged(self, quality: Quality, *, pooled: bool) -> None:
        self.heard.append((quality, pooled))


def data(name: str, count: int = 8) -> list[dict[str, Tensor]]:
    """Batches of two windows; of encoder-decoders the second one is padded, in each batch by another amount."""
    made = batches(name, count)
    for number, batch in enumerate(made if "decoder_input_ids" in made[0] else ()):
        mask = torch.ones_like(batch["decoder_input_ids"])
        mask[1, 5 + number % 4 :] = 0
        batch["decoder_attention_mask"] = mask
    return made


def asked(folder: Path, method: str = "auto", groups: int = 2, *, search: bool = False) -> Plan:
    return on_text(make_plan(layout_of(folder), groups, method=method), choose=method == "auto", search=search)


def by_mean(plan: Plan) -> Plan:
    """The same groups, mean-pooled."""
    layers = (replace(want, key_method="mean", value_method="mean") for want in plan.layers)
    return replace(plan, layers=tuple(layers), calibration=None, repair=None, grouping=None)


@torch.no_grad()
def scores(folder: Path, inputs: dict[str, Tensor]) -> np.ndarray:
    """Logarithms of probabilities in float64, (B, T, V), of the whole model."""
    model: Any = regroup.load(folder, dtype=torch.float32, attn_implementation="eager", progress=False)
    return model.eval()(**inputs, use_cache=False).logits.double().log_softmax(-1).numpy()


def plainly(parent: Path, children: list[Path], inputs: dict[str, Tensor]) -> tuple[list[np.ndarray], list[float]]:
    """KL divergences of each child by window and position (NaN where there is no text), and the losses of all."""
    ids = inputs.get("decoder_input_ids", inputs["input_ids"]).numpy()
    mask = inputs.get("decoder_attention_mask", torch.ones_like(inputs["input_ids"])[:, : ids.shape[1]]).numpy() > 0
    found = [scores(folder, inputs) for folder in (parent, *children)]
    kl = [np.where(mask, (np.exp(found[0]) * (found[0] - q)).sum(-1), np.nan) for q in found[1:]]
    losses = []
    for q in found:
        each = [
            -q[row, place, ids[row, place + 1]]
            for row in range(ids.shape[0])
            for place in range(ids.shape[1] - 1)
            if mask[row, place] and mask[row, place + 1]
        ]
        losses.append(float(np.mean(each)))
    return kl, losses


@pytest.mark.parametrize("name", ["llama", "bart"])
def test_quality_is_that_of_whole_models(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, listener = saved(name), Heard()
    plan = asked(folder, search=name == "llama")
    done = carried_out(folder, plan, tmp_path / "child", data(name), listener=listener, device="cpu")
    carried_out(folder, by_mean(done.result.plan), tmp_path / "mean")
    (quality, pooled), held_out = listener.heard[0], data(name)[-1]
    kl, losses = plainly(folder, [tmp_path / "child", tmp_path / "mean"], held_out)
    assert (pooled, quality.separate, quality.windows) == (False, True, 2)
    assert quality.tokens == np.isfinite(kl[0]).sum()
    assert quality.kl == pytest.approx(np.nanmean(kl[0]), rel=1e-3)
    assert quality.pooled_kl == pytest.approx(np.nanmean(kl[1]), rel=1e-3)
    assert (quality.loss, quality.converted_loss) == pytest.approx(losses[:2], rel=1e-4)
    # Of a ratio of two sums over windows; where windows are equally long it is the usual error of a mean.
    sums, sizes = np.nansum(kl[0], 1), np.isfinite(kl[0]).sum(1)
    apart = sums - np.nanmean(kl[0]) * sizes
    assert quality.kl_error == pytest.approx(math.sqrt(2 * (apart**2).sum()) / sizes.sum(), rel=1e-2)
    if name == "llama":
        assert quality.kl_error == pytest.approx(np.std(np.nanmean(kl[0], 1), ddof=1) / math.sqrt(2), rel=1e-2)
    # Other text has another loss, and the two models differ.
    other, _ = plainly(folder, [tmp_path / "child"], data(name)[0])
    assert quality.kl != pytest.approx(np.nanmean(other[0]), rel=1e-2)
    assert quality.kl < quality.pooled_kl
    assert done.result.calibration is not None
    assert done.result.calibration["quality"] == {**quality.to_json(), "pooled": False}


def test_text_is_set_apart_where_there_is_enough() -> None:
    def parts(count: int, length: int) -> tuple[list[int], list[int], bool]:
        made = [{"input_ids": torch.full((2, length), number)} for number in range(count)]
        fit, unseen, separate = set_apart(made)
        numbers = [[int(batch["input_ids"][0, 0]) for batch in part] for part in (fit, unseen)]
        return numbers[0], numbers[1], separate

    assert parts(8, 12) == (list(range(7)), [7], True)
    assert parts(64, 12) == (list(range(56)), list(range(56, 64)), True)
    # No more than 2,048 tokens, and one batch at least.
    assert parts(64, 512) == (list(range(62)), [62, 63], True)
    assert parts(4, 2048) == ([0, 1, 2], [3], True)
    # There is too little to take any away.
    assert parts(3, 12) == ([0, 1, 2], [2], False)


def test_what_was_set_apart_is_not_fitted_on(saved: Saved, tmp_path: Path) -> None:
    folder = saved("llama")
    whole, without = data("llama"), data("llama")
    without[-1] = {name: value.flip(1) for name, value in without[-1].items()}
    seen = [
        carried_out(folder, asked(folder), tmp_path / str(number), part, device="cpu")
        for number, part in enumerate((whole, without))
    ]
    assert_same_tensors(tensors(tmp_path / "0"), tensors(tmp_path / "1"))
    records = [done.result.calibration or {} for done in seen]
    assert records[0]["quality"] != records[1]["quality"]
    assert records[0]["layers"] == records[1]["layers"]


@pytest.fixture
def garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Output projections are solved wrongly, and that is not noticed on the way."""

    def wrong(fit: Regression, held_out: Regression, given: Tensor) -> Refit:
        return Refit(-3 * given.double(), 0.0, 0.0)

    monkeypatch.setattr(layer_regression, "refit_output", wrong)


@pytest.mark.usefixtures("garbage")
@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"])
def test_where_pooling_loses_less_heads_are_pooled(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, listener = saved(name), Heard()
    groups = max(g for g in (1, 2, 3) if tiny.FAMILIES[name].num_key_value_heads % g == 0)
    plan = asked(folder, groups=groups, search=name == "gpt2")
    done = carried_out(folder, plan, tmp_path / "child", data(name), listener=listener, device="cpu")
    quality, pooled = listener.heard[0]
    assert pooled
    assert quality.kl > quality.pooled_kl
    expected = by_mean(done.result.plan)
    assert done.result.plan == expected
    carried_out(folder, expected, tmp_path / "mean")
    assert_same_tensors(tensors(tmp_path / "child"), tensors(tmp_path / "mean"))
    assert quality.pooled_kl == pytest.approx(
        np.nanmean(plainly(folder, [tmp_path / "child"], data(name)[-1])[0][0]), rel=1e-3
    )
    written = json.loads((tmp_path / "child" / RESULT_FILE).read_text())
    assert {layer["key_method"] for layer in written["plan"]["layers"]} == {"mean"}
    assert written["calibration"]["quality"]["pooled"]
    assert "layer_costs" not in written["calibration"]
    assert verify(folder, tmp_path / "child", device="cpu")["results"]["verdict"] == "passed"


@pytest.mark.usefixtures("garbage")
def test_a_run_that_was_killed_after_it_pools_as_well(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved("llama")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    def convert(place: str) -> Path:
        carried_out(folder, asked(folder), tmp_path / place / "child", data("llama"), device="cpu")
        return tmp_path / place / "child"

    for place in ("whole", "resumed"):
        (tmp_path / place).mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            convert("resumed")
    with monkeypatch.context() as patch:
        patch.setattr(LayerConverter, "convert", lambda *_: pytest.fail("solved again"))
        resumed = convert("resumed")
    assert digests(resumed) == digests(convert("whole"))


@pytest.mark.usefixtures("garbage")
def test_what_was_asked_for_by_name_stays_with_a_warning(saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "parent")
    texts.tokenizer().save_pretrained(folder)
    (tmp_path / "text.txt").write_text(texts.TEXT * 4)
    words = ("--calibration", tmp_path / "text.txt", "--calibration-window", 32, "--calibration-tokens", 1024)
    words = (*words, "--kv-heads", 2, "--device", "cpu")
    status, _, err = run("convert", folder, tmp_path / "named", "--method", "lowrank", *words)
    assert status == 0, err
    assert "--method mean" in " ".join(err.split())
    written = json.loads((tmp_path / "named" / RESULT_FILE).read_text())
    assert {layer["key_method"] for layer in written["plan"]["layers"]} == {"lowrank"}
    quality = written["calibration"]["quality"]
    assert not quality["pooled"]
    assert quality["kl"] > quality["pooled_kl"]
    # The negative control: the same where nothing was asked for.
    status, _, err = run("convert", folder, tmp_path / "open", *words)
    assert status == 0, err
    assert "the heads are mean-pooled" in " ".join(err.split())


def test_one_named_method_is_kept_as_well(saved: Saved, tmp_path: Path, garbage: None) -> None:
    folder, listener = saved("llama"), Heard()
    plan = asked(folder)
    plan = replace(plan, layers=(replace(plan.layers[0], key_method="lowrank"), *plan.layers[1:]))
    done = carried_out(folder, plan, tmp_path / "child", data("llama"), listener=listener, device="cpu")
    assert listener.heard[0][0].worse_than_pooling
    assert not listener.heard[0][1]
    assert done.result.plan.layers[0].key_method == "lowrank"


def test_a_converted_model_without_numbers(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pooling takes the place of it; where methods were asked for by name there is nothing to write."""
    folder = saved("llama")
    monkeypatch.setattr(layer_regression, "refit_output", lambda *given: Refit(given[-1] * math.nan, 0.0, 0.0))
    done = carried_out(folder, asked(folder), tmp_path / "open", data("llama"), device="cpu")
    carried_out(folder, by_mean(done.result.plan), tmp_path / "mean")
    assert_same_tensors(tensors(tmp_path / "open"), tensors(tmp_path / "mean"))
    record = json.loads((tmp_path / "open" / RESULT_FILE).read_text(), parse_constant=pytest.fail)["calibration"]
    assert record["held_out_kl_nats_per_token"] is None
    assert record["quality"]["kl"] is None
    assert math.isfinite(record["quality"]["pooled_kl"])
    with pytest.raises(RegroupError, match="predictions of a converted model are not finite"):
        carried_out(folder, asked(folder, "lowrank"), tmp_path / "named", data("llama"), device="cpu")
    assert not (tmp_path / "named").exists()


@pytest.mark.parametrize(
    ("kl", "pooled_kl", "worse"),
    [
        (1.0, 2.0, False),
        (2.0, 2.0, False),
        (2.0, 1.0, True),
        (math.nan, 1.0, True),
        (math.inf, 1.0, True),
        (math.nan, math.nan, False),
        (1.0, math.inf, False),
    ],
)
def test_numbers_that_are_not_finite(kl: float, pooled_kl: float, worse: bool) -> None:
    quality = Quality(24, 1, 3.0, math.nan, kl, None, pooled_kl, True)
    assert quality.worse_than_pooling == worse
    record = json.loads(json.dumps(quality.to_json(), allow_nan=False))
    assert record["converted_loss"] is None
    assert record["kl"] == (kl if math.isfinite(kl) else None)
    assert record["pooled_kl"] == (pooled_kl if math.isfinite(pooled_kl) else None)


@pytest.mark.parametrize("name", ["llama", "bart", "t5", "whisper"])
@torch.no_grad()
def test_logits_by_parts_are_those_of_the_whole(name: str, saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, made = saved(name), data(name, 2)
    runner = LayerRunner(folder, layout_of(folder), made)
    model: Any = regroup.load(folder, dtype=torch.float32, attn_implementation="eager", progress=False)
    hidden = torch.empty(0)
    for batch, inputs in enumerate(made):
        hidden = runner.hidden[batch]
        for index in range(len(runner)):
            hidden = runner.layer(index).forward(batch, hidden)
        expected = model.eval()(**inputs, use_cache=False).logits
        for row in range(2):
            whole = runner.logits(batch, hidden, row)
            torch.testing.assert_close(whole, expected[row], rtol=1e-3, atol=1e-3)
            parts = [runner.logits(batch, hidden, row, slice(start, start + 5)) for start in range(0, 12, 5)]
            torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-5, atol=1e-5)
    # Sums over a window do not depend on the size of the parts either.
    last, other = len(made) - 1, hidden + torch.linspace(0, 1, hidden.shape[-1])
    found = [divergence.compare(runner, last, 1, hidden, {"other": other, "same": hidden})]
    monkeypatch.setattr(divergence, "_POSITIONS", 5)
    monkeypatch.setattr(divergence, "_TERMS", 2)
    found.append(divergence.compare(runner, last, 1, hidden, {"other": other, "same": hidden}))
    assert (found[0].tokens, found[0].predicted) == (found[1].tokens, found[1].predicted)
    assert found[0].kl["other"] == pytest.approx(found[1].kl["other"], rel=1e-4)
    assert found[0].losses == pytest.approx(found[1].losses, rel=1e-5)
    assert abs(found[0].kl["same"]) < 1e-5 < found[0].kl["other"]
    assert found[0].loss == found[0].losses["same"] != found[0].losses["other"]
