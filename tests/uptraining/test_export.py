"""The finished model in the form of its source, for every family and however its tensors were named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from conftest import Converted, Saved
from helpers import assert_same_tensors, config_of, copy, digests, scattered, tensors, write
from regroup.checkpoint import open_checkpoint
from regroup.errors import RegroupError
from regroup.modeling import load
from regroup.uptraining.export import check_names, freeze_tables, write_model


def rewritten(folder: Path, target: Path, *, moved: float = 0.0) -> Path:
    """Load a checkpoint in float32, move every parameter, and write it in its own form."""
    checkpoint = open_checkpoint(folder)
    model: Any = load(folder, dtype=torch.float32, progress=False)
    freeze_tables(model, checkpoint.tensors.keys())
    check_names(checkpoint, model, values=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += moved
    write_model(checkpoint, model, target)
    return target


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_what_was_not_trained_is_the_same_file(name: str, converted: Converted, tmp_path: Path) -> None:
    grouped = converted(name, "mixed")
    assert digests(rewritten(grouped, tmp_path / "out")) == digests(grouped)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "mixtral", "t5", "gpt2", "bart"])
def test_what_was_trained_is_what_the_model_holds(name: str, converted: Converted, tmp_path: Path) -> None:
    grouped = converted(name, "mixed")
    out = rewritten(grouped, tmp_path / "out", moved=0.25)
    trained: Any = load(out, dtype=torch.float32, progress=False)
    before: Any = load(grouped, dtype=torch.float32, progress=False)
    for parameter, old in zip(trained.parameters(), before.parameters(), strict=True):
        assert torch.equal(parameter, old + 0.25)


def test_tables_that_are_not_stored_are_not_trained(saved: Saved, tmp_path: Path) -> None:
    """Pegasus was published without its sines; where a file has them they are trained, as transformers does."""
    state = {name: tensor for name, tensor in tensors(saved("pegasus")).items() if "embed_positions" not in name}
    folder = write(tmp_path / "in", config_of(saved("pegasus")), state)
    assert digests(rewritten(folder, tmp_path / "out"))["model.safetensors"] == digests(folder)["model.safetensors"]
    for source, trained in ((folder, False), (saved("pegasus"), True)):
        checkpoint, model = open_checkpoint(source), load(source, progress=False)
        freeze_tables(model, checkpoint.tensors.keys())
        assert model.get_parameter("model.encoder.embed_positions.weight").requires_grad is trained
        assert model.get_parameter("model.encoder.layers.0.fc1.weight").requires_grad


def test_shards_dtypes_and_buffers_stay(saved: Saved, tmp_path: Path) -> None:
    state = {name: tensor.to(torch.bfloat16) for name, tensor in tensors(saved("llama")).items()}
    # Older checkpoints hold such buffers; the model does not know them.
    state["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.arange(5.0)
    folder = write(tmp_path / "in", config_of(saved("llama")), state, shards=scattered(list(state)))
    out = rewritten(folder, tmp_path / "out")
    assert digests(out)["model-00001-of-00004.safetensors"] == digests(folder)["model-00001-of-00004.safetensors"]
    assert_same_tensors(tensors(out), tensors(folder))
    assert json.loads((out / "model.safetensors.index.json").read_text()) == json.loads(
        (folder / "model.safetensors.index.json").read_text()
    )


@pytest.mark.parametrize("name", ["gpt2", "bloom", "llama"])
def test_names_without_their_prefix_stay_without_it(name: str, saved: Saved, tmp_path: Path) -> None:
    prefix = {"gpt2": "transformer.", "bloom": "transformer.", "llama": "model."}[name]
    state = {key.removeprefix(prefix): tensor for key, tensor in tensors(saved(name)).items()}
    folder = write(tmp_path / "in", config_of(saved(name)), state)
    assert_same_tensors(tensors(rewritten(folder, tmp_path / "out")), state)


def test_tied_weights_that_are_stored_twice_stay_equal(saved: Saved, tmp_path: Path) -> None:
    state = tensors(saved("qwen2"))
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    folder = write(tmp_path / "in", config_of(saved("qwen2")), state)
    found = tensors(rewritten(folder, tmp_path / "out", moved=0.25))
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert not torch.equal(found["lm_head.weight"], state["lm_head.weight"])


def test_code_of_others_is_not_carried_along(saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    (folder / "modeling_other.py").write_text("")
    config = {**config_of(folder), "auto_map": {"AutoModelForCausalLM": "modeling_other.Other"}}
    (folder / "config.json").write_text(json.dumps(config))
    out = rewritten(folder, tmp_path / "out")
    assert "auto_map" not in config_of(out)
    assert not (out / "modeling_other.py").exists()


def test_tensors_that_the_model_does_not_account_for_are_refused(saved: Saved) -> None:
    folder = saved("llama")
    checkpoint = open_checkpoint(folder)
    model: Any = load(folder, dtype=torch.float32, progress=False)
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(RegroupError, match=r"not those of the loaded model(.|\n)*extra"):
        check_names(checkpoint, model, values=True)
    del model.extra
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(RegroupError, match=r"lm_head.weight(.|\n)*other values"):
        check_names(checkpoint, model, values=True)
    check_names(checkpoint, model, values=False)
