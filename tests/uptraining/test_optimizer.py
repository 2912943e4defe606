"""Muon with AdamW: what each trains, at which rate, and that a state continues bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import tiny
from helpers import assert_same_tensors, tensors
from regroup.errors import RegroupError
from regroup.uptraining.defaults import resolved
from regroup.uptraining.optimizer import HAS_MUON, MuonAdamW, make_optimizer
from regroup.uptraining.recipe import Recipe
from regroup.uptraining.run import uptrain

pytestmark = pytest.mark.skipif(not HAS_MUON, reason="PyTorch before 2.9 has no Muon")

GIVEN: dict[str, Any] = {
    "rate": 1e-2,
    "attention_rate": 4.0,
    "adamw_rate": 0.5,
    "betas": (0.9, 0.95),
    "weight_decay": 0.1,
}


def made(model: Any, attention: tuple[str, ...], *, muon: bool = True) -> tuple[MuonAdamW, dict[str, tuple[Any, ...]]]:
    """The optimizer, and for each parameter by name who trains it, at which rate and decay."""
    optimizer = make_optimizer(
        model, muon=muon, attention=attention, decayed=[n for n, p in model.named_parameters() if p.ndim > 1], **GIVEN
    )
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    return optimizer, {
        name: (groups[id(p)]["part"], groups[id(p)]["lr"], groups[id(p)]["weight_decay"])
        for name, p in model.named_parameters()
        if id(p) in groups
    }


def test_every_parameter_has_its_optimizer_and_rate() -> None:
    model = tiny.build("llama")
    _, found = made(model, ("layers.0.self_attn",))
    first, second = "model.layers.0.", "model.layers.1."
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        assert found[f"{first}self_attn.{name}.weight"] == ("muon", pytest.approx(4e-2), 0.1)
        assert found[f"{second}self_attn.{name}.weight"] == ("muon", pytest.approx(1e-2), 0.1)
    assert found[f"{first}mlp.up_proj.weight"] == ("muon", pytest.approx(1e-2), 0.1)
    assert found["model.embed_tokens.weight"] == ("adamw", pytest.approx(5e-3), 0.1)
    assert found["lm_head.weight"] == ("adamw", pytest.approx(5e-3), 0.1)
    assert found[f"{first}input_layernorm.weight"] == ("adamw", pytest.approx(5e-3), 0.0)
    assert len(found) == len(dict(model.named_parameters()))
    _, alone = made(model, ("layers.0.self_attn",), muon=False)
    assert {part for part, _, _ in alone.values()} == {"adamw"}
    assert alone[f"{first}self_attn.k_proj.weight"][1] == pytest.approx(4e-2)
    assert alone["model.embed_tokens.weight"][1] == pytest.approx(1e-2)


@pytest.mark.parametrize("name", ["gpt_neox", "gpt2"])
def test_one_matrix_for_several_projections_is_attentions(name: str) -> None:
    model = tiny.build(name)
    module = {"gpt_neox": "layers.0.attention", "gpt2": "h.0.attn"}[name]
    fused = {"gpt_neox": "query_key_value", "gpt2": "c_attn"}[name]
    _, found = made(model, (module,))
    (weight,) = (value for key, value in found.items() if f"{module}.{fused}.weight" in key)
    assert weight == ("muon", pytest.approx(4e-2), 0.1)
    (bias,) = (value for key, value in found.items() if f"{module}.{fused}.bias" in key)
    assert bias[:2] == ("adamw", pytest.approx(5e-3))


def test_what_is_not_trained_has_no_state() -> None:
    model = tiny.build("llama")
    frozen = model.get_parameter("model.layers.0.mlp.up_proj.weight").requires_grad_(False)
    optimizer, found = made(model, ())
    assert "model.layers.0.mlp.up_proj.weight" not in found
    steps(model, optimizer, 1)
    assert frozen not in optimizer.state
    assert len(optimizer.state) == len(found)


def steps(model: Any, optimizer: Any, count: int) -> None:
    for number in range(count):
        ids = torch.arange(24).reshape(2, 12) + number
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def test_a_step_is_that_of_the_two_optimizers_alone() -> None:
    model, other = tiny.build("llama"), tiny.build("llama")
    optimizer, found = made(model, ("layers.0.self_attn",))
    parameters = dict(other.named_parameters())
    parts = []
    for part, make in (("muon", torch.optim.Muon), ("adamw", torch.optim.AdamW)):
        groups = [
            {"params": [parameters[name]], "lr": rate, "weight_decay": decay}
            for name, (own, rate, decay) in found.items()
            if own == part
        ]
        extra: dict[str, Any] = (
            {"adjust_lr_fn": "match_rms_adamw"} if part == "muon" else {"betas": (0.9, 0.95), "fused": True}
        )
        parts.append(make(groups, **extra))
    steps(model, optimizer, 2)
    for number in range(2):
        ids = torch.arange(24).reshape(2, 12) + number
        other.zero_grad()
        other(input_ids=ids, labels=ids).loss.backward()
        for part in parts:
            part.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, parameters[name]), name


def test_a_state_continues_bit_for_bit() -> None:
    model = tiny.build("llama")
    optimizer, _ = made(model, ("layers.0.self_attn",))
    steps(model, optimizer, 2)
    other = copy.deepcopy(model)
    again, _ = made(other, ("layers.0.self_attn",))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, 2)
    steps(other, again, 2)
    for (name, left), right in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(left, right), name


def test_a_run_with_muon_resumes_bit_for_bit(shop: Path, tmp_path: Path) -> None:
    settings = {"teacher": str(shop / "parent"), "optimizer": "muon", "windows": "documents", "steps": 4}
    settings |= {"save_every": 2, "keep": 2}
    whole = uptrain(runs.recipe(shop, output=tmp_path / "whole", **settings))
    assert whole.record is not None
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "kept")
    run = (tmp_path / "whole" / "run.json").read_text()
    (tmp_path / "broken").mkdir()
    (tmp_path / "kept").rename(tmp_path / "broken" / "checkpoint-2")
    (tmp_path / "broken" / "run.json").write_text(run)
    rest = uptrain(runs.recipe(shop, output=tmp_path / "broken", **settings))
    assert rest.resumed_from == 2
    assert_same_tensors(tensors(tmp_path / "whole" / "model"), tensors(tmp_path / "broken" / "model"))
    assert whole.record["configuration"]["attention_rate"] == 4


def test_decoders_with_a_teacher_are_distilled_with_muon() -> None:
    def chosen(family: str = "llama", encoder_decoder: bool = False, width: int = 64, **settings: Any) -> Recipe:
        return resolved(Recipe("child", Path("out"), ("a.txt",), **settings), family, encoder_decoder, width)[0]

    found = chosen(teacher="parent")
    assert (found.optimizer, found.learning_rate, found.attention_rate, found.batch_size) == ("muon", 2e-3, 4, 4)
    assert (found.weight_decay, found.schedule, found.warmup) == (0, "cosine", 0.05)
    assert chosen(teacher="parent", width=576).learning_rate == pytest.approx(6.7e-4)
    asked = chosen(teacher="parent", attention_rate=1.0, learning_rate=1e-4, batch_size=8)
    assert (asked.attention_rate, asked.learning_rate, asked.batch_size) == (1, 1e-4, 8)
    # What was there before: no teacher, an encoder-decoder, sharding.
    for other in (chosen(), chosen("bart", True, teacher="parent"), chosen(teacher="parent", fsdp=True)):
        assert (other.optimizer, other.attention_rate) == ("adamw", None)
    with pytest.raises(RegroupError, match="whole matrices"):
        chosen(teacher="parent", optimizer="muon", fsdp=True)
