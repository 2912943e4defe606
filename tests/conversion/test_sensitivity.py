"""What each layer costs, measured on text: against whole models, by enumeration, and through the command."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import regroup
import texts
import tiny
from helpers import assembled, carried_out, config_of, copy, divergence, everything, layout_of, on_text, refused, run
from regroup.calibration import budgeted, quality, sensitivity
from regroup.calibration import text as text_module
from regroup.calibration.budgeted import Budgeted
from regroup.calibration.joint import Heads
from regroup.calibration.layer_runner import LayerRunner
from regroup.calibration.sensitivity import Measured, measure
from regroup.calibration.settings import Settings
from regroup.calibration.text import calibration_batches
from regroup.checkpoint import open_checkpoint
from regroup.conversion import plan as planning
from regroup.conversion.plan import plan as plan_checkpoint
from regroup.errors import RegroupError
from regroup.files import sha256_of
from regroup.listener import Listener
from regroup.plans import CalibrationText, Plan, make_plan
from regroup.solver.grouping import weight_losses
from regroup.solver.similarity import compare_heads

Saved = Callable[[str], Path]
WORDS = "the cat sat on the mat; the hat is flat.\nnaïve café: 42 cats or a flat mat sat\n"


@pytest.fixture(scope="module", autouse=True)
def _nothing_set_apart() -> Iterator[None]:
    """Conversions calibrate on all of the text, as measurements of single layers do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "set_apart", lambda batches: (list(batches), list(batches[-1:]), False))
        yield


@pytest.fixture(scope="module")
def llama(saved: Saved, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of three layers and six heads, with a tokenizer."""
    folder = copy(saved("llama"), tmp_path_factory.mktemp("parent") / "llama")
    texts.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 8)
    return CalibrationText(path, tokens=192, window=12, batch=2)


@pytest.fixture(scope="module")
def batches(llama: Path, text: CalibrationText) -> list[dict[str, Tensor]]:
    return calibration_batches(text, llama, config_of(llama))


CHOICES = (1, 3, 6)


@pytest.fixture(scope="module")
def measured(llama: Path, batches: list[dict[str, Tensor]]) -> dict[str, dict[int, Measured]]:
    return measured_of(llama, batches)


def measured_of(
    folder: Path, batches: list[dict[str, Tensor]], choices: tuple[int, ...] = CHOICES, **settings: Any
) -> dict[str, dict[int, Measured]]:
    layout = layout_of(folder)
    plan = on_text(make_plan(layout, layers={}, method="auto"), choose=settings.pop("choose", True))
    every = {layer.name: choices for layer in layout.layers}
    return measure(open_checkpoint(folder), layout, plan, every, batches, Settings(**settings))


def alone(folder: Path, chosen: Measured) -> Plan:
    """A plan that changes one layer, as it was measured."""
    plan = make_plan(layout_of(folder), layers={})
    return replace(plan, layers=tuple(chosen.want if x.name == chosen.want.name else x for x in plan.layers))


@pytest.mark.parametrize("name", sorted(tiny.FAMILIES))
@torch.no_grad()
def test_logits_are_the_models_own(name: str, saved: Saved) -> None:
    """From hidden states after the last layer the stream makes what the model makes; from earlier ones it does not."""
    folder = saved(name)
    stream = LayerRunner(folder, layout_of(folder), [tiny.inputs(name, 2, 12, seed=seed) for seed in range(2)])
    model: Any = regroup.load(folder, dtype=torch.float32, attn_implementation="eager", progress=False)
    for batch, inputs in enumerate(stream.batches):
        last: list[Tensor] = []
        block = model.eval().base_model.get_submodule(stream._path)[-1]
        hook = block.register_forward_hook(
            lambda _, __, out, seen=last: seen.append(out[0] if isinstance(out, tuple) else out)
        )
        expected = model(**inputs, use_cache=False).logits
        hook.remove()
        # Layers of the stream have run, as they have when logits are asked for.
        before = stream.layer(0).forward(batch, stream.hidden[batch])
        for row in range(2):
            torch.testing.assert_close(stream.logits(batch, last[0], row), expected[row], rtol=1e-5, atol=1e-5)
            assert (stream.logits(batch, before, row) - expected[row]).abs().max() > 0.1
            # Nothing else of the batch counts.
            torch.testing.assert_close(stream.logits(1 - batch, last[0], row), expected[row], rtol=1e-5, atol=1e-5)


def test_the_models_layers_are_left_as_they_are(saved: Saved) -> None:
    """Asking for logits neither copies nor replaces the layers of the model."""
    stream = LayerRunner(saved("llama"), layout_of(saved("llama")), [tiny.inputs("llama", 2, 12)])
    blocks = list(stream.blocks)
    with torch.no_grad():
        stream.logits(0, stream.hidden[0], 0)
    assert list(stream.model.base_model.layers) == blocks == list(stream.blocks)
    shell = dict(stream._shell.named_parameters())
    assert shell
    assert not [name for name in shell if ".layers." in name]


def test_costs_are_those_of_whole_models(
    llama: Path, text: CalibrationText, batches: list[dict[str, Tensor]], measured: Any, tmp_path: Path
) -> None:
    """Each layer alone, converted by the command's own route and run as a whole model on the held-out windows."""
    held_out = batches[-round(len(batches) / 8) :]
    found = []
    for name, costs in measured.items():
        for heads in (1, 3):
            child = tmp_path / f"{name}-{heads}"
            regroup.convert(llama, child, plan=alone(llama, costs[heads]), calibration=text)
            layers = layout_of(child).layers
            assert [x.name for x in layers if x.num_key_value_heads == heads] == [name]
            assert costs[heads].kl == pytest.approx(divergence(llama, child, held_out), rel=1e-4)
            found.append(costs[heads].kl)
            if heads == 3 and name.endswith("0.self_attn"):
                # On other windows, and without text, it is another number.
                assert costs[heads].kl != pytest.approx(divergence(llama, child, batches[:1]), rel=1e-2)
                regroup.convert(llama, tmp_path / "weights", plan=alone(llama, costs[heads]))
                assert divergence(llama, tmp_path / "weights", held_out) != pytest.approx(costs[heads].kl, rel=1e-2)
    assert len(set(found)) == 6
    assert min(found) > 1e-3


def test_the_parents_own_number_costs_nothing_and_is_not_tried(
    llama: Path, batches: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[tuple[str, int]] = []
    real = sensitivity.LayerConverter.convert

    def spy(self: Any, student: Any, layers: Any, solvers: Any, *rest: Any) -> Any:
        tried.append((layers[-1].name, solvers[0].want.num_key_value_heads))
        return real(self, student, layers, solvers, *rest)

    monkeypatch.setattr(sensitivity.LayerConverter, "convert", spy)
    found = measured_of(llama, batches[:4], (2, 6), choose=False, search=False)
    assert tried == [(layer.name, 2) for layer in layout_of(llama).layers]
    for costs in found.values():
        assert (costs[6].kl, costs[6].want.changes) == (0.0, False)
        assert (costs[2].kl > 0, costs[2].want.changes) == (True, True)


def pairs(name: str) -> list[dict[str, Tensor]]:
    """Batches with padding at the ends of sources and targets."""
    found = []
    for seed in range(4):
        inputs = tiny.inputs(name, 2, 8, seed=seed)
        mask = torch.ones_like(inputs["decoder_input_ids"])
        mask[1, 5:] = 0
        inputs["attention_mask"][1, 6:] = 0
        found.append({**inputs, "decoder_attention_mask": mask})
    return found


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_encoder_decoders_with_padding(name: str, saved: Saved, tmp_path: Path) -> None:
    """Self- and cross-attention, against whole models; only positions that hold text count."""
    folder, data = saved(name), pairs(name)
    layout = layout_of(folder)
    found = measured_of(folder, data, (2, 6), choose=False, search=False, repair="none")
    assert {layer.kind for layer in layout.layers} == {"self", "cross"}
    assert list(found) == [layer.name for layer in layout.layers]
    for name, costs in list(found.items())[-3:]:
        plan = on_text(alone(folder, costs[2]), choose=False, search=False)
        carried_out(folder, plan, tmp_path / name, data, settings=Settings(search=False, repair="none"), device="cpu")
        assert costs[6].kl == 0
        assert costs[2].kl == pytest.approx(divergence(folder, tmp_path / name, data[-1:]), rel=1e-4, abs=1e-8)
        everywhere = [{k: v for k, v in data[-1].items() if k != "decoder_attention_mask"}]
        assert costs[2].kl != pytest.approx(divergence(folder, tmp_path / name, everywhere), rel=1e-3)


QUICK: dict[str, Any] = {"method": "lowrank", "grouping": "contiguous", "repair": "none"}


class Whole:
    """Models with any numbers of KV heads, put together from single layers that whole conversions converted alone.

    ``choosing`` and ``reporting`` are the two rows of the one batch that is held out.
    """

    def __init__(self, folder: Path, text: CalibrationText, batches: list[dict[str, Tensor]], place: Path) -> None:
        self.folder, self.place = folder, place
        self.names = [layer.name for layer in layout_of(folder).layers]
        self.choosing, self.reporting = ([{"input_ids": batches[-1]["input_ids"][row : row + 1]}] for row in (0, 1))
        plan = make_plan(layout_of(folder), layers={}, method="lowrank")
        every = dict.fromkeys(self.names, (1, 2, 3, 6))
        measured = measure(
            open_checkpoint(folder), layout_of(folder), plan, every, batches, Settings(search=False, repair="none")
        )
        self.tensors: dict[tuple[str, int], dict[str, Tensor]] = {}
        whole = load_file(folder / "model.safetensors")
        for name, number in product(self.names, (1, 2, 3, 6)):
            child = place / f"{name}-{number}"
            if number < 6:
                plan = alone(folder, measured[name][number])
                regroup.convert(folder, child, plan=plan, calibration=text, repair="none")
            made = load_file(child / "model.safetensors") if number < 6 else whole
            self.tensors[name, number] = {key: value for key, value in made.items() if key.startswith(name)}
        self.rest = {key: value for key, value in whole.items() if ".self_attn." not in key}
        self.known: dict[tuple[Heads, bool], float] = {}

    def loss(self, heads: Sequence[int], *, reported: bool = False) -> float:
        key = tuple(heads), reported
        if key not in self.known:
            shape = self.place / "-".join(map(str, heads))
            if not shape.exists():
                state = dict(self.rest)
                for one in zip(self.names, heads, strict=True):
                    state |= self.tensors[one]
                assembled(self.folder, shape, dict(zip(self.names, heads, strict=True)), state)
            self.known[key] = divergence(self.folder, shape, self.reporting if reported else self.choosing)
        return self.known[key]

    def costs(self) -> list[dict[int, float]]:
        return [
            {number: self.loss([number if each == place else 6 for each in range(3)]) for number in (1, 2, 3, 6)}
            for place in range(3)
        ]


@pytest.fixture(scope="module")
def whole(
    llama: Path, text: CalibrationText, batches: list[dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory
) -> Whole:
    return Whole(llama, replace(text, sha256=None), batches, tmp_path_factory.mktemp("whole"))


class Chosen(Listener):
    """Keeps what was found on the way to a plan."""

    found: Budgeted

    def chosen(self, found: Budgeted) -> None:
        self.found = found


def cache(folder: Path, heads: Sequence[int]) -> int:
    """Bytes a token in 16 bits."""
    return sum(2 * 2 * g * layer.head_dim for g, layer in zip(heads, layout_of(folder).layers, strict=True))


def cheapest(costs: list[dict[int, float]], folder: Path, limit: float, allowed: Sequence[int]) -> tuple[int, ...]:
    """Of all combinations that fit the one that costs least."""
    fitting = [way for way in product(allowed, repeat=len(costs)) if cache(folder, way) <= limit]
    return min(fitting, key=lambda way: sum(by[g] for by, g in zip(costs, way, strict=True)))


def exchanges(heads: Sequence[int], allowed: Sequence[int]) -> list[tuple[int, ...]]:
    """All numbers that differ in one layer, or give one layer more and another one less."""
    steps = [(way, [b - a for a, b in zip(heads, way, strict=True) if a != b]) for way in product(allowed, repeat=3)]
    return [way for way, by in steps if len(by) == 1 or (len(by) == 2 and by[0] * by[1] < 0)]


@pytest.mark.parametrize("budget", ["20%", "50%", "360B", "359B", "100%"])
def test_budgets_by_whole_models(budget: str, llama: Path, text: CalibrationText, whole: Whole) -> None:
    """From the cheapest sum of all that fit, to the byte, to a plan that no exchange betters, as whole models tell."""
    full = cache(llama, [6, 6, 6])
    limits = {"20%": full * 0.2, "50%": full / 2, "360B": 360, "359B": 359, "100%": full}
    seen = Chosen()
    plan, layout = plan_checkpoint(llama, kv_budget=budget, calibration=text, listener=seen, **QUICK)
    plan.check(layout)
    heads, costs = [layer.num_key_value_heads for layer in plan.layers], whole.costs()
    refined = seen.found.refined
    assert plan.kv_budget == budget
    assert refined.heads == tuple(heads)
    assert cache(llama, heads) <= limits[budget]
    # The search starts at the least sum of what single layers cost alone.
    assert refined.start == cheapest(costs, llama, limits[budget], (1, 2, 3, 6))
    expected = [by[g] for by, g in zip(costs, heads, strict=True)]
    assert [layer.predicted_kl for layer in plan.layers] == pytest.approx(expected, rel=1e-4)
    assert seen.found.summed == pytest.approx(sum(expected), rel=1e-4)
    # It is led by the loss of whole models, and ends where no exchange within the budget lowers it.
    assert refined.loss == pytest.approx(whole.loss(heads), rel=1e-4, abs=1e-9)
    assert refined.start_loss == pytest.approx(whole.loss(refined.start), rel=1e-4, abs=1e-9)
    assert refined.loss <= refined.start_loss
    assert refined.settled
    near = [way for way in exchanges(heads, (1, 2, 3, 6)) if cache(llama, way) <= limits[budget]]
    assert min((whole.loss(way) for way in near), default=math.inf) >= refined.loss * (1 - 1e-3)
    # What is expected of it was measured on text that nothing was chosen on.
    assert plan.predicted_kl == seen.found.kl == pytest.approx(whole.loss(heads, reported=True), rel=1e-4, abs=1e-9)
    if budget != "100%":
        assert plan.predicted_kl != pytest.approx(whole.loss(heads), rel=1e-2)
        assert plan.predicted_kl != pytest.approx(sum(expected), rel=1e-2)
    if budget == "360B":
        assert cache(llama, cheapest(costs, llama, 359, (1, 2, 3, 6))) < cache(llama, refined.start) == 360


def test_tensor_parallel_budgets(llama: Path, text: CalibrationText, whole: Whole) -> None:
    """Over two devices three KV heads cannot be divided, whatever they cost."""
    limit = cache(llama, [6, 6, 6]) * 0.7
    best = cheapest(whole.costs(), llama, limit, (1, 2, 6))
    assert best != cheapest(whole.costs(), llama, limit, (1, 2, 3, 6))
    for calibration in (text, None):
        seen = Chosen()
        plan, _ = plan_checkpoint(
            llama, kv_budget="70%", tensor_parallel=2, calibration=calibration, listener=seen, **QUICK
        )
        heads = [layer.num_key_value_heads for layer in plan.layers]
        assert set(heads) <= {1, 2, 6}
        assert cache(llama, heads) <= limit
        assert plan.tensor_parallel == 2
        if calibration is not None:
            assert seen.found.refined.start == best
            assert whole.loss(heads) <= whole.loss(best) * (1 + 1e-4)


def test_the_parents_own_number_need_not_be_allowed(saved: Saved) -> None:
    """Six KV heads cannot be divided over four devices; a budget asks for fewer anyway."""
    folder = saved("llama_grouped")
    plan, layout = plan_checkpoint(folder, kv_budget="50%", tensor_parallel=4, calibration="none")
    assert {layer.num_key_value_heads for layer in plan.layers} <= {1, 2, 4}
    plan.check(layout)
    assert "over the tensor-parallel devices" in refused("plan", folder, "--kv-heads", 6, "--tensor-parallel", 4)


def test_weights_alone_predict_nothing(llama: Path) -> None:
    """Without text the budget is met and no KL is claimed."""
    plan, layout = plan_checkpoint(llama, kv_budget="50%", calibration="none")
    heads = [layer.num_key_value_heads for layer in plan.layers]
    assert cache(llama, heads) <= cache(llama, [6, 6, 6]) / 2
    assert plan.predicted_kl is None
    assert {layer.predicted_kl for layer in plan.layers} == {None}
    assert plan.kv_budget == "50%"
    # Heads are searched for by default, and stand as they stood on request.
    assert any(layer.query_order is not None for layer in plan.layers)
    still, _ = plan_checkpoint(llama, kv_budget="50%", grouping="contiguous", calibration="none")
    assert [layer.num_key_value_heads for layer in still.layers] == heads
    assert {layer.query_order for layer in still.layers} == {None}
    plan.check(layout)


def test_weights_alone_by_enumeration(llama: Path) -> None:
    """Without text the energy that neighbours lose stands for the cost: of all combinations the one with the least."""
    layout = layout_of(llama)
    names = [layer.name for layer in layout.layers]
    shares = weight_losses(open_checkpoint(llama), layout, dict.fromkeys(names, (1, 2, 3, 6)))
    costs = [shares[name] for name in names]
    # The same figures as of `inspect --similarity`, which knows G that divide the parent's alone.
    for layer in compare_heads(open_checkpoint(llama), layout):
        assert layer.overall is not None
        for heads, share in layer.overall.contiguous.items():
            assert shares[layer.name][heads] == pytest.approx(share)
    assert all(0 < by[3] < by[2] < by[1] < 1 for by in costs)
    for budget in ("20%", "40%", "70%"):
        plan, _ = plan_checkpoint(llama, kv_budget=budget, calibration="none")
        limit = cache(llama, [6, 6, 6]) * float(budget[:-1]) / 100
        assert [x.num_key_value_heads for x in plan.layers] == list(cheapest(costs, llama, limit, (1, 2, 3, 6)))


def test_a_planned_budget_is_carried_out(llama: Path, text: CalibrationText, tmp_path: Path) -> None:
    """The plan names its text and converts on it, or without; with it the model is closer to its parent."""
    path = tmp_path / "plan.json"
    options = ("--calibration", text.data, "--calibration-tokens", 96)
    options = (*options, "--calibration-window", text.window, "--calibration-batch", text.batch)
    # Of three devices' allowed numbers there are two below the parent's.
    status, _, err = run("plan", llama, "--kv-budget", "60%", "--tensor-parallel", 3, *options, "-o", path)
    assert status == 0, err
    said = json.loads(path.read_text())
    assert said["kv_budget"] == "60%"
    assert said["calibration"]["sha256"] == sha256_of(Path(str(text.data)))
    assert said["calibration"]["data"] == "words.txt"
    assert f"--plan {path} --calibration {text.data}" in " ".join(err.split())
    assert "compared" in err
    assert f"expect a KL divergence from the original model of {said['predicted_kl']:.3f}" in " ".join(err.split())
    heads = [layer["num_key_value_heads"] for layer in said["layers"]]
    data = calibration_batches(replace(text, tokens=96), llama, config_of(llama))
    apart = {}
    for name, more in (("text", ("--calibration", text.data)), ("weights", ("--calibration", "none"))):
        status, _, err = run("convert", llama, tmp_path / name, "--plan", path, *more)
        assert status == 0, err
        assert [layer.num_key_value_heads for layer in layout_of(tmp_path / name).layers] == heads
        apart[name] = divergence(llama, tmp_path / name, data)
    assert apart["text"] < apart["weights"]
    # Costs of single layers need not add up, but they are no other kind of number.
    held_out = divergence(llama, tmp_path / "text", data[-1:])
    assert 0.3 * said["predicted_kl"] < held_out < 3 * said["predicted_kl"]


def test_without_text_the_model_writes_it(llama: Path, tmp_path: Path) -> None:
    """By default the loss is measured, on text of the model's own, which the plan names and a conversion uses."""
    path, sizes = tmp_path / "plan.json", ("--calibration-tokens", 192, "--calibration-window", 12)
    sizes = (*sizes, "--calibration-batch", 2)
    status, _, err = run("plan", llama, "--kv-budget", "50%", "--tensor-parallel", 3, *sizes, "-o", path)
    assert status == 0, err
    made = Plan.load(path)
    assert made.calibration is not None
    assert (made.calibration.own, made.calibration.tokens) == (True, 192)
    assert made.predicted_kl is not None
    assert made.predicted_kl > 0
    assert f"--plan {path}" in " ".join(err.split())
    status, _, err = run("convert", llama, tmp_path / "child", "--plan", path)
    assert status == 0, err
    assert f"predicted by the plan: {made.predicted_kl:.3f}" in " ".join(err.split())
    # The same text again, and so a loss of the same size.
    kl = json.loads((tmp_path / "child/regroup_result.json").read_text())["calibration"]["held_out_kl_nats_per_token"]
    assert 0.3 * made.predicted_kl < kl < 3 * made.predicted_kl


def test_budgets_that_cannot_be(llama: Path, text: CalibrationText, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is wrong is said before text is read or a layer is run."""

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("measured before it was checked")

    monkeypatch.setattr(budgeted, "plan_within", never)
    monkeypatch.setattr(planning, "weight_losses", never)
    monkeypatch.setattr(text_module, "calibration_batches", never)
    words = ("--calibration", text.data)
    cases: list[tuple[tuple[object, ...], tuple[str, ...]]] = [
        (("--kv-budget", "10%"), ("smaller than the smallest", "at least 120 bytes", "16.67%")),
        (("--kv-budget", "120%"), ("larger than the original model's cache",)),
        (("--kv-budget", "25%", "--kv-heads", 2), ("were both given", "one of them")),
        (("--kv-budget", "25%", "--layers", "0:2"), ("were both given",)),
        (("--kv-budget", "a quarter"), ("budget",)),
        (("--kv-budget", "25%", "--tensor-parallel", 4), ("over that many devices",)),
        (("--kv-budget", "25%", "--repair", "magic"), ("repair is not known",)),
        (("--kv-budget", "25%", "--method", "median"), ("merge method is not known",)),
        (("--kv-budget", "25%", "--grouping", "best"), ("grouping is not known",)),
    ]
    for options, expected in cases:
        for more in ((), words):
            message = refused("plan", llama, *options, *more)
            assert [word for word in expected if word not in message] == []
    with pytest.raises(AssertionError, match="measured before"):
        plan_checkpoint(llama, kv_budget="25%", calibration=text)
    with pytest.raises(AssertionError, match="measured before"):
        plan_checkpoint(llama, kv_budget="25%", calibration="none")


def test_methods_that_text_cannot_carry_out(saved: Saved, llama: Path, text: CalibrationText, tmp_path: Path) -> None:
    """Fresh heads are no linear maps that text could solve, and a norm lets none through."""
    words = ("--calibration", text.data, "--calibration-tokens", 96, "--calibration-window", 12)
    for verb in (("plan", llama, "--kv-budget", "50%"), ("convert", llama, tmp_path / "x", "--kv-heads", 2)):
        assert "random" in refused(*verb, "--method", "random", *words)
    message = refused("plan", saved("qwen3"), "--kv-budget", "50%", "--method", "lowrank", *words)
    assert "a norm follows the key projection" in message
    assert everything(tmp_path) == []


def test_options_about_text_that_is_not_there(llama: Path, tmp_path: Path) -> None:
    """Whoever asks for a repair expects one: without text there is none."""
    for options in (("--repair", "distill"), ("--document-starts",), ("--calibration-tokens", 5)):
        for verb in (("convert", llama, tmp_path / "x", "--kv-heads", 2), ("plan", llama, "--kv-budget", "50%")):
            message = refused(*verb, "--calibration", "none", *options)
            assert "needs calibration text" in message
            assert options[0] in message
    with pytest.raises(RegroupError, match="repair is not known"):
        regroup.convert(llama, tmp_path / "x", kv_heads=2, repair="distil", calibration="none")
    assert everything(tmp_path) == []


def test_a_plan_that_cannot_be_written_is_refused_before_it_is_made(llama: Path, tmp_path: Path) -> None:
    assert "is a folder" in refused("plan", llama, "--kv-heads", 2, "-o", tmp_path)


def test_a_model_of_infinities_is_refused(llama: Path, text: CalibrationText, tmp_path: Path) -> None:
    """A broken MLP shows in the hidden states, a broken last norm in the predictions alone."""
    words = ("--calibration", text.data, "--calibration-tokens", 96, "--calibration-window", 12)
    for number, (name, expected) in enumerate(
        {
            "model.layers.1.mlp.down_proj.weight": "hidden states are not finite",
            "model.norm.weight": "predictions are not finite",
        }.items()
    ):
        broken = tmp_path / f"parent-{number}"
        shutil.copytree(llama, broken)
        held = load_file(broken / "model.safetensors")
        held[name].view(-1)[0] = torch.inf
        save_file(held, broken / "model.safetensors", {"format": "pt"})
        before = everything(tmp_path)
        assert expected in refused("convert", broken, tmp_path / "x", "--kv-heads", 2, *words)
        assert everything(tmp_path) == before


def test_repair_lowers_the_error_that_merging_left(llama: Path, text: CalibrationText, tmp_path: Path) -> None:
    regroup.convert(llama, tmp_path / "x", kv_heads=1, calibration=text)
    layers = json.loads((tmp_path / "x/regroup_result.json").read_text())["calibration"]["layers"]
    assert all(layer["error"] <= layer["error_merged"] for layer in layers)
    assert any(layer["error"] < 0.99 * layer["error_merged"] for layer in layers)
