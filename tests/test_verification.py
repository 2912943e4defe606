"""`regroup verify`: what conversion writes keeps its promises; what is changed afterwards is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
import tiny
from helpers import copy, refused, run
from regroup.opening import open_layout
from regroup.verification import verify

Saved = Callable[[str], Path]


def verdict(parent: Path, child: Path, **more: Any) -> tuple[str, str]:
    """The verdict, and what is said of broken promises."""
    results = verify(str(parent), str(child), **more)["results"]
    broken = [f"{p['name']}: {p['detail']}" for p in results["promises"] if p["held"] is False]
    return results["verdict"], "\n".join(broken)


@pytest.mark.parametrize("method", ["mean", "first", "random", "procrustes", "lowrank", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "t5", "bart"])
def test_what_conversion_writes_keeps_its_promises(name: str, method: str, saved: Saved, tmp_path: Path) -> None:
    child = tmp_path / "child"
    heads = min(layer.num_attention_heads for layer in open_layout(str(saved(name))).layers)
    fewer = next(count for count in range(heads - 1, 0, -1) if heads % count == 0)
    status, _, message = run("convert", saved(name), child, "--kv-heads", fewer, "--method", method)
    assert status == 0, message
    assert verdict(saved(name), child) == ("kept", "")
    status, out, _ = run("verify", saved(name), child, "-o", tmp_path / "record.json")
    assert status == 0
    assert "merged tensors are made again, bit for bit" in out
    assert json.loads((tmp_path / "record.json").read_text())["kind"] == "verify"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    parent = tiny.save("llama", folder / "parent", max_shard_size="20KB")
    status, _, message = run("convert", parent, folder / "child", "--kv-heads", 2, "--method", "mean")
    assert status == 0, message
    return parent, folder / "child"


def changed(folder: Path, name: str, edit: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Replace one tensor of a checkpoint, or drop it."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            new = edit(tensors.pop(name))
            if new is not None:
                tensors[name] = new.contiguous()
            save_file(tensors, path, metadata={"format": "pt"})
            return
    raise AssertionError(name)


def _one_bit(tensor: torch.Tensor) -> torch.Tensor:
    raw = tensor.clone().view(torch.int32)
    raw.view(-1)[3] ^= 1
    return raw.view(tensor.dtype)


K, EMBED = "model.layers.1.self_attn.k_proj.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("name", "edit", "words"),
    [
        (EMBED, _one_bit, ("untouched tensors", EMBED)),
        (K, _one_bit, ("made again", K)),
        (K, lambda tensor: tensor.view(2, -1, tensor.shape[1]).flip(0).reshape(tensor.shape), ("made again", K)),
        (K, lambda tensor: tensor[:-1], ("shapes", K, "[19, 48] in")),
        (K, lambda tensor: tensor.half(), ("shapes", K, "F16")),
    ],
)
def test_a_changed_tensor_is_found_and_named(
    name: str,
    edit: Callable[[torch.Tensor], torch.Tensor],
    words: tuple[str, ...],
    pair: tuple[Path, Path],
    tmp_path: Path,
) -> None:
    parent, child = pair[0], copy(pair[1], tmp_path / "child")
    changed(child, name, edit)
    found, said = verdict(parent, child)
    assert found == "broken"
    for word in words:
        assert word in said
    status, out, _ = run("verify", parent, child)
    assert status == 1
    assert "a check failed" in out


def test_a_tensor_that_lies_in_another_shard_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    parent, child = pair[0], copy(pair[1], tmp_path / "child")
    index = json.loads((child / "model.safetensors.index.json").read_text())
    source = index["weight_map"][K]
    other = next(file for file in index["weight_map"].values() if file != source)
    tensors, target = load_file(child / source), load_file(child / other)
    target[K] = tensors.pop(K)
    save_file(tensors, child / source, metadata={"format": "pt"})
    save_file(target, child / other, metadata={"format": "pt"})
    index["weight_map"][K] = other
    (child / "model.safetensors.index.json").write_text(json.dumps(index))
    found, said = verdict(parent, child)
    assert found == "broken"
    assert K in said
    assert other in said


def test_a_truncated_shard_and_a_changed_config_are_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    parent, child = pair[0], copy(pair[1], tmp_path / "child")
    shard = max(child.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found, said = verdict(parent, child)
    assert found == "broken"
    assert shard.name in said
    child = copy(pair[1], tmp_path / "other")
    config = json.loads((child / "config.json").read_text())
    (child / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found, said = verdict(parent, child)
    assert found == "broken"
    assert "rms_norm_eps" in said


def test_another_parent_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", max_shard_size="20KB", seed=7)
    found, said = verdict(other, pair[1])
    assert found == "broken"
    assert "untouched tensors" in said
    assert "made again" in said


def test_a_plan_that_does_not_fit_cannot_be_checked(pair: tuple[Path, Path], saved: Saved, tmp_path: Path) -> None:
    assert "plan" in refused("verify", saved("mistral"), pair[1])
    child = copy(pair[1], tmp_path / "child")
    (child / "regroup_plan.json").unlink()
    assert "regroup_plan.json" in refused("verify", pair[0], child)
    assert "not a folder" in refused("verify", pair[0], tmp_path / "nothing")


def test_solved_tensors_are_told_apart_and_loss_is_held_against_the_prediction(tmp_path: Path) -> None:
    parent, _ = runs.pair(tmp_path)
    train, held_out = runs.text(tmp_path)
    flags = ("--calibration", train, "--calibration-tokens", 512, "--calibration-window", 32)
    plan, child = tmp_path / "plan.json", tmp_path / "solved"
    assert run("plan", parent, "--kv-budget", "50%", "-o", plan, *flags)[0] == 0
    status, _, message = run("convert", parent, child, "--plan", plan, *flags)
    assert status == 0, message
    status, out, _ = run("verify", parent, child, "--data", held_out, "--window", 32, "--windows", 8)
    assert status == 0, out
    assert "cannot be made again without the text" in out
    assert "predicted" in out
    # A prediction that nothing could keep to.
    kept = json.loads((child / "regroup_plan.json").read_text())
    kept["predicted_kl"] = 1e-9
    (child / "regroup_plan.json").write_text(json.dumps(kept))
    found, said = verdict(parent, child, data=held_out, window=32, windows=8)
    assert found == "broken"
    assert "at most 0.0000 allowed" in said
    # An untouched tensor is compared all the same, and what was solved has to be numbers.
    changed(child, EMBED, _one_bit)
    assert EMBED in verdict(parent, child)[1]
    changed(child, EMBED, _one_bit)
    changed(child, K, lambda tensor: torch.full_like(tensor, float("nan")))
    assert "are numbers" in verdict(parent, child)[1]


def test_an_uptrained_child_is_checked_for_structure(pair: tuple[Path, Path], tmp_path: Path) -> None:
    parent, child = pair[0], copy(pair[1], tmp_path / "child")
    changed(child, EMBED, _one_bit)
    assert verdict(parent, child, uptrained=True)[0] == "kept"
    changed(child, EMBED, lambda tensor: None)
    found, said = verdict(parent, child, uptrained=True)
    assert found == "broken"
    shutil.rmtree(child)
    assert EMBED in said


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_masks_beside_the_weights_are_compared_too(dtype: torch.dtype, saved: Saved, tmp_path: Path) -> None:
    """Pythia's and GPT-2's files hold them."""
    mask = "gpt_neox.layers.0.attention.bias"
    parent, child = copy(saved("gpt_neox"), tmp_path / "parent"), tmp_path / "child"
    state = load_file(parent / "model.safetensors")
    save_file({**state, mask: torch.ones(1, 1, 64, 64, dtype=dtype)}, parent / "model.safetensors", {"format": "pt"})
    assert run("convert", parent, child, "--kv-heads", 3, "--method", "mean")[0] == 0
    assert verdict(parent, child) == ("kept", "")
    changed(child, mask, lambda tensor: tensor.logical_not().to(dtype))
    found, said = verdict(parent, child)
    assert found == "broken"
    assert mask in said


def _swap(file: Path) -> None:
    """Two token ids of a tokenizer change places."""
    tokenizer = json.loads(file.read_text())
    one, other, *_ = vocabulary = tokenizer["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))


BESIDE: dict[str, Callable[[Path], object]] = {
    "tokenizer.json differs": lambda child: _swap(child / "tokenizer.json"),
    "tokenizer.json is missing": lambda child: (child / "tokenizer.json").unlink(),
    "generation_config.json differs": lambda child: (child / "generation_config.json").write_text('{"top_k": 1}'),
    "special_tokens_map.json is not expected": lambda child: (child / "special_tokens_map.json").write_text("{}"),
    "chat_template.jinja is not expected": lambda child: (child / "chat_template.jinja").write_text("x"),
    "tool.py is not expected": lambda child: (child / "tool.py").write_text("x = 1"),
    "modeling_regroup.py is not that of": lambda child: (child / "modeling_regroup.py").write_text("x = 1"),
    "modeling_regroup.py is missing": lambda child: (child / "modeling_regroup.py").unlink(),
}


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original with a tokenizer, and a converted model with another number of KV heads in each layer."""
    folder = tmp_path_factory.mktemp("beside")
    parent, _ = runs.pair(folder)
    status, _, message = run("convert", parent, folder / "mixed", "--layers", "0:2,1:3,2:1", "--method", "mean")
    assert status == 0, message
    return parent, folder / "mixed"


@pytest.mark.parametrize("words", BESIDE)
def test_files_beside_the_weights_are_compared(words: str, spoken: tuple[Path, Path], tmp_path: Path) -> None:
    parent, child = spoken[0], copy(spoken[1], tmp_path / "child")
    (child / "notes.txt").write_text("files that no loader reads may be added")
    assert verdict(parent, child) == ("kept", "")
    BESIDE[words](child)
    found, said = verdict(parent, child)
    assert found == "broken"
    assert words in said
    assert verdict(parent, child, uptrained=True)[0] == "kept"
