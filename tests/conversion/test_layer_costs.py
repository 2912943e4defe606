"""Layers that ruin a conversion: what each adds to the loss, against whole models; and what the user is told."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

import regroup
import texts
import tiny
from helpers import assembled, carried_out, config_of, divergence, layout_of, run
from regroup.calibration.joint import first_tokens, split_batches, token_count
from regroup.calibration.layer_costs import LayerCosts, affordable_tokens, suspects, warning
from regroup.calibration.quality import set_apart
from regroup.calibration.text import calibration_batches
from regroup.plans import CalibrationText, Plan, Result, make_plan

LAYERS = 6
WORDS = "the cat sat on the mat; the hat is flat.\nnaïve café: 42 cats or a flat mat sat\n"


def parent(folder: Path, *, loud: int | None) -> Path:
    """A Llama of six layers whose attention hardly counts, but in the layer ``loud``."""
    kwargs: dict[str, Any] = {**tiny.FAMILIES["llama"].kwargs, "num_hidden_layers": LAYERS}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**kwargs))
    tiny.randomize(model, std=0.2, seed=0)
    quiet = 0.3 if loud is None else 0.1
    weights: dict[str, Any] = dict(model.named_parameters())
    with torch.no_grad():
        # Otherwise the first layers, next to which the embedding is small, count more than all others.
        weights["model.embed_tokens.weight"] *= 6
        for index in range(LAYERS):
            weights[f"model.layers.{index}.self_attn.o_proj.weight"] *= 3 if index == loud else quiet
            weights[f"model.layers.{index}.mlp.down_proj.weight"] *= 0.5
    model.save_pretrained(folder)
    texts.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(WORDS * 12)
    return CalibrationText(path, tokens=384, window=12, batch=2)


OPTIONS = ("--calibration-tokens", 384, "--calibration-window", 12, "--calibration-batch", 2)


@pytest.fixture(scope="module")
def converted(text: CalibrationText, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int | None], Any]:
    """For a loud layer: the original model, the converted one, and what the command said."""
    place, made = tmp_path_factory.mktemp("models"), {}

    def convert(loud: int | None) -> tuple[Path, Path, str]:
        if loud not in made:
            source, child = parent(place / f"parent-{loud}", loud=loud), place / f"child-{loud}"
            status, _, err = run("convert", source, child, "--kv-heads", 1, "--calibration", text.data, *OPTIONS)
            assert status == 0, err
            made[loud] = source, child, " ".join(err.split())
        return made[loud]

    return convert


def costs_of(child: Path) -> dict[str, Any]:
    return json.loads((child / "regroup_result.json").read_text())["calibration"]["layer_costs"]


def test_costs_are_those_of_whole_models(converted: Any, text: CalibrationText, tmp_path: Path) -> None:
    """The model converted up to each layer, and conversions of their own on less text, run on held-out windows."""
    source, child, _ = converted(3)
    batches, _, _ = set_apart(calibration_batches(text, source, config_of(source)))
    found = costs_of(child)
    held_out = batches[-round(len(batches) / 8) :]
    windows = first_tokens(held_out, affordable_tokens(token_count(batches), LAYERS))
    assert found["tokens"] == token_count(windows) > 0
    whole, part = load_file(source / "model.safetensors"), load_file(child / "model.safetensors")
    names = [layer.name for layer in layout_of(source).layers]
    so_far = [0.0]
    for count in range(1, LAYERS + 1):
        heads = {name: 1 if place < count else 6 for place, name in enumerate(names)}
        kept = tuple(f"{name}." for name in names[count:])
        state = {key: whole[key] if kept and key.startswith(kept) else part[key] for key in whole}
        so_far.append(divergence(source, assembled(source, tmp_path / str(count), heads, state), windows))
    assert list(found["added_kl"]) == names
    steps = [after - before for before, after in itertools.pairwise(so_far)]
    assert list(found["added_kl"].values()) == pytest.approx(steps, rel=1e-3, abs=1e-5)
    assert found["kl_nats_per_token"] == pytest.approx(so_far[-1], rel=1e-4)
    few = [*batches[: round((len(batches) - len(held_out)) / 12)], held_out[0]]
    plan = replace(
        Plan.load(child / "regroup_plan.json"), layers=Result.load(child / "regroup_result.json").plan.layers
    )
    layers = (replace(w, num_key_value_heads=6) if w.name == names[3] else w for w in plan.layers)
    for name, given in (("less", plan), ("without", replace(plan, layers=tuple(layers)))):
        carried_out(source, given, tmp_path / name, few, device="cpu")
    assert found["kl_on_less_text"] == pytest.approx(divergence(source, tmp_path / "less", few[-1:]), rel=1e-3)
    without = divergence(source, tmp_path / "without", few[-1:])
    assert found["kl_on_less_text_without"][names[3]] == pytest.approx(without, rel=1e-3)


def test_a_layer_that_ruins_the_rest_is_named(converted: Any, text: CalibrationText, tmp_path: Path) -> None:
    """With its share, with what would be lost without it, and with commands that do spare it."""
    loud = 3
    source, child, said = converted(loud)
    found, name = costs_of(child), f"model.layers.{loud}.self_attn"
    kl, kept = found["kl_on_less_text"], found["kl_on_less_text_without"][name]
    assert f"{name} costs {kl - kept:.2f} of the {kl:.2f} nats per token" in said
    assert f"with its 6 KV heads kept it would lose {kept:.2f}" in said
    assert said.count("nats per token that a conversion") == 1
    assert f"--kv-heads 1 --layers {loud}:6" in said
    budget = f"{math.ceil(1000 * 11 / 36) / 10:g}%"
    assert f"--kv-budget {budget}" in said
    # Either remedy is a command that works, and keeps the layer whole.
    spared, words = tmp_path / "spared", ("--calibration", text.data, *OPTIONS)
    status, _, err = run("convert", source, spared, "--kv-heads", 1, "--layers", f"{loud}:6", *words)
    assert status == 0, err
    assert "nats per token that a conversion" not in " ".join(err.split())
    held_out = calibration_batches(text, source, config_of(source))[-2:]
    assert divergence(source, spared, held_out) < 0.8 * divergence(source, child, held_out)
    # Over two devices there are fewer plans to compare.
    given = ("--kv-budget", budget, "--tensor-parallel", 2, *words)
    status, _, err = run("plan", source, *given, "-o", tmp_path / "plan.json")
    assert status == 0, err
    heads = [layer.num_key_value_heads for layer in Plan.load(tmp_path / "plan.json").layers]
    assert heads[loud] > 1
    assert sum(heads) <= 11


def test_layers_that_share_the_loss_are_not(converted: Any) -> None:
    """The control: a model without a loud layer, all of whose layers count a little."""
    _, child, said = converted(None)
    assert "nats per token that a conversion" not in said
    found = costs_of(child)
    assert found["kl_nats_per_token"] > 0.1
    # None adds so much more than the others that it would be looked at again.
    assert "kl_on_less_text_without" not in found


def test_what_is_suspected() -> None:
    def found(kl: float, *added: float) -> list[str]:
        return suspects(kl, dict(zip("abcdefg", added, strict=False)))

    assert found(1.0, 0.6, 0.05, 0.05, 0.05) == ["a"]
    assert found(1.0, 0.3, 0.0, 0.4, -0.01, 0.01) == ["c", "a"]
    assert found(1.0, 0.25, 0.25, 0.25, 0.25) == []  # all alike
    assert found(1.0, 0.19, 0.01, 0.01, 0.01) == []  # no dominant share
    assert found(1.0, 0.3, 0.1, 0.1, 0.1) == []  # not so many times the median
    assert found(0.04, 0.03, 0.0, 0.0, 0.0) == []  # next to nothing is lost
    assert found(1.0, 0.9, 0.0, 0.0) == []  # of three layers
    assert found(1.0, 0.3, 0.4, 0.3, 0.0, 0.0, 0.0, 0.0) == ["b", "a"]  # the worst two


def test_what_counts_as_ruinous() -> None:
    def found(kl: float, **spared: float) -> list[str]:
        return LayerCosts(1.0, {}, 100, kl, spared).ruinous

    assert found(2.0, a=1.5, b=0.5) == ["b", "a"]
    assert found(2.0, a=1.61) == []
    assert found(0.1, a=0.06) == []
    assert LayerCosts(1.0, {}, 100).ruinous == []


def test_encoder_decoders_are_told_which_attention(tmp_path: Path) -> None:
    """Self- and cross-attention of one decoder layer have one number."""
    layout = layout_of(tiny.save("bart", tmp_path / "bart"))
    plan = make_plan(layout, 1)
    names = [layer.name for layer in layout.layers]
    worst = next(layer for layer in layout.layers if layer.kind == "cross")
    costs = LayerCosts(2.0, dict.fromkeys(names, 0.1), 100, 2.0, {worst.name: 0.5})
    said = warning(costs, layout, plan, "some/model")
    assert said is not None
    assert f"--layers cross.{worst.index}:6" in said
    make_plan(layout, 1, layers=f"cross.{worst.index}:6").check(layout)
    mixed = replace(plan, layers=(replace(plan.layers[0], num_key_value_heads=2), *plan.layers[1:]))
    said = warning(costs, layout, mixed, "some/model")
    assert said is not None
    assert "--layers" not in said
    assert "regroup plan some/model --kv-budget" in said


def test_text_is_limited_to_what_calibration_took() -> None:
    assert affordable_tokens(65_536, 28) == 2048
    assert affordable_tokens(16_384, 30) == 491
    assert affordable_tokens(16_384, 30) * 30 / 2 <= 0.15 * 3 * 16_384
    batch = {"input_ids": torch.arange(40).view(4, 10)}
    assert [token_count(first_tokens([batch, batch], n)) for n in (5, 10, 39, 40, 65, 1000)] == [5, 10, 30, 40, 60, 80]


def test_halves_share_no_row() -> None:
    rows = torch.arange(5)
    batches = [{"input_ids": rows[a:b, None].repeat(1, 3)} for a, b in ((0, 2), (2, 5))]
    first, second = split_batches(batches)
    halves = [[int(row[0]) for batch in half for row in batch["input_ids"]] for half in (first, second)]
    assert halves == [[0, 2, 3], [1, 4]]
    single = [{"input_ids": rows[a : a + 1, None]} for a in range(3)]
    first, second = split_batches(single)
    assert [int(b["input_ids"][0]) for b in first] == [0]
    assert [int(b["input_ids"][0]) for b in second] == [1, 2]
    assert split_batches(single[:1]) == (single[:1], single[:1])


def test_nothing_is_restored_where_it_would_cost_too_much(
    text: CalibrationText, converted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, _, _ = converted(3)
    from regroup.calibration import layer_costs

    monkeypatch.setattr(layer_costs, "_SHARE", 0.01)
    regroup.convert(source, tmp_path / "child", kv_heads=1, calibration=text)
    assert "layer_costs" not in json.loads((tmp_path / "child/regroup_result.json").read_text())["calibration"]
