"""`regroup verify`: what conversion writes passes every check; what is changed afterwards is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import runs
import tiny
from helpers import copy, refused, run
from regroup.errors import RegroupError
from regroup.opening import open_layout
from regroup.plans import PLAN_FILE, RESULT_FILE, Plan, Result, found_plan
from regroup.verification import verify

Saved = Callable[[str], Path]


def verdict(original: Path, converted: Path, **more: Any) -> tuple[str, str]:
    """The verdict, and the failed checks."""
    results = verify(str(original), str(converted), **more)["results"]
    failed = [f"{c['name']}: {c['detail']}" for c in results["checks"] if c["passed"] is False]
    return results["verdict"], "\n".join(failed)


@pytest.mark.parametrize("method", ["mean", "first", "random", "procrustes", "lowrank", "auto"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "t5", "bart"])
def test_what_conversion_writes_passes_every_check(name: str, method: str, saved: Saved, tmp_path: Path) -> None:
    converted = tmp_path / "converted"
    heads = min(layer.num_attention_heads for layer in open_layout(str(saved(name))).layers)
    fewer = next(count for count in range(heads - 1, 0, -1) if heads % count == 0)
    text = ["--calibration", "none"] if method == "auto" else []
    status, _, message = run("convert", saved(name), converted, "--kv-heads", fewer, "--method", method, *text)
    assert status == 0, message
    assert verdict(saved(name), converted) == ("passed", "")
    status, out, _ = run("verify", saved(name), converted, "-o", tmp_path / "record.json")
    assert status == 0
    assert "merged tensors, computed again, are the same bit for bit" in out
    assert json.loads((tmp_path / "record.json").read_text())["kind"] == "verify"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("verify")
    original = tiny.save("llama", folder / "original", max_shard_size="20KB")
    status, _, message = run("convert", original, folder / "converted", "--kv-heads", 2, "--method", "mean")
    assert status == 0, message
    return original, folder / "converted"


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
        (EMBED, _one_bit, ("unchanged tensors", EMBED)),
        (K, _one_bit, ("computed again", K)),
        (K, lambda tensor: tensor.view(2, -1, tensor.shape[1]).flip(0).reshape(tensor.shape), ("computed again", K)),
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
    original, converted = pair[0], copy(pair[1], tmp_path / "converted")
    changed(converted, name, edit)
    found, said = verdict(original, converted)
    assert found == "failed"
    for word in words:
        assert word in said
    status, out, _ = run("verify", original, converted)
    assert status == 1
    assert "a check failed" in out


def test_a_tensor_in_another_shard_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, converted = pair[0], copy(pair[1], tmp_path / "converted")
    index = json.loads((converted / "model.safetensors.index.json").read_text())
    source = index["weight_map"][K]
    other = next(file for file in index["weight_map"].values() if file != source)
    tensors, target = load_file(converted / source), load_file(converted / other)
    target[K] = tensors.pop(K)
    save_file(tensors, converted / source, metadata={"format": "pt"})
    save_file(target, converted / other, metadata={"format": "pt"})
    index["weight_map"][K] = other
    (converted / "model.safetensors.index.json").write_text(json.dumps(index))
    found, said = verdict(original, converted)
    assert found == "failed"
    assert K in said
    assert other in said


def test_a_truncated_shard_and_a_changed_config_are_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, converted = pair[0], copy(pair[1], tmp_path / "converted")
    shard = max(converted.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    found, said = verdict(original, converted)
    assert found == "failed"
    assert shard.name in said
    converted = copy(pair[1], tmp_path / "other")
    config = json.loads((converted / "config.json").read_text())
    (converted / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found, said = verdict(original, converted)
    assert found == "failed"
    assert "rms_norm_eps" in said


def test_another_original_model_is_found(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = tiny.save("llama", tmp_path / "other", max_shard_size="20KB", seed=7)
    found, said = verdict(other, pair[1])
    assert found == "failed"
    assert "unchanged tensors" in said
    assert "computed again" in said


def test_a_plan_that_does_not_fit_cannot_be_checked(pair: tuple[Path, Path], saved: Saved, tmp_path: Path) -> None:
    assert "plan" in refused("verify", saved("mistral"), pair[1])
    converted = copy(pair[1], tmp_path / "converted")
    (converted / "regroup_plan.json").unlink()
    assert "regroup_plan.json" in refused("verify", pair[0], converted)
    assert "not a folder" in refused("verify", pair[0], tmp_path / "nothing")


def test_a_result_answers_its_plan_and_no_other(saved: Saved, tmp_path: Path) -> None:
    """What a search found is what is compared, for every plan that it carries out; never in the place of another."""
    converted, asked = tmp_path / "converted", tmp_path / "asked.json"
    status, _, message = run("convert", saved("llama"), converted, "--kv-heads", 2, "--calibration", "none")
    assert status == 0, message
    own, found = converted / PLAN_FILE, Result.load(converted / RESULT_FILE).plan
    request = Plan.load(own)
    assert request != found
    for same in (request, found):
        asked.write_text(same.dumps())
        assert found_plan(converted, asked) == (found, False)
        assert verdict(saved("llama"), converted, plan=asked) == ("passed", "")
    for other in (
        replace(request, seed=1),
        replace(request, layers=(replace(request.layers[0], num_key_value_heads=3), *request.layers[1:])),
        replace(request, layers=(replace(request.layers[0], value_method="mean"), *request.layers[1:])),
    ):
        asked.write_text(other.dumps())
        assert found_plan(converted, asked) == (other, False)
        own.write_text(other.dumps())
        with pytest.raises(RegroupError, match="not one of the plan next to it"):
            found_plan(converted)
    # A request that was kept elsewhere is enough.
    own.unlink()
    asked.write_text(request.dumps())
    assert verdict(saved("llama"), converted, plan=asked) == ("passed", "")


def test_solved_tensors_are_checked_and_loss_is_compared_with_the_prediction(tmp_path: Path) -> None:
    original, _ = runs.pair(tmp_path)
    train, held_out = runs.text(tmp_path)
    flags = ("--calibration", train, "--calibration-tokens", 512, "--calibration-window", 32)
    plan, converted = tmp_path / "plan.json", tmp_path / "solved"
    assert run("plan", original, "--kv-budget", "50%", "-o", plan, *flags)[0] == 0
    status, _, message = run("convert", original, converted, "--plan", plan, *flags)
    assert status == 0, message
    status, out, _ = run("verify", original, converted, "--data", held_out, "--window", 32, "--windows", 8)
    assert status == 0, out
    assert "without the text they cannot be computed again" in out
    assert "predicted" in out
    # A prediction that no model could meet.
    stored = json.loads((converted / "regroup_result.json").read_text())
    stored["plan"]["predicted_kl"] = 1e-9
    (converted / "regroup_result.json").write_text(json.dumps(stored))
    found, said = verdict(original, converted, data=held_out, window=32, windows=8)
    assert found == "failed"
    assert "at most 0.0000 allowed" in said
    # Unchanged tensors are compared all the same, and solved ones have to be finite.
    changed(converted, EMBED, _one_bit)
    assert EMBED in verdict(original, converted)[1]
    changed(converted, EMBED, _one_bit)
    changed(converted, K, lambda tensor: torch.full_like(tensor, float("nan")))
    assert "are finite" in verdict(original, converted)[1]


def test_an_uptrained_model_is_checked_for_structure(pair: tuple[Path, Path], tmp_path: Path) -> None:
    original, converted = pair[0], copy(pair[1], tmp_path / "converted")
    changed(converted, EMBED, _one_bit)
    assert verdict(original, converted, uptrained=True)[0] == "passed"
    changed(converted, EMBED, lambda tensor: None)
    found, said = verdict(original, converted, uptrained=True)
    assert found == "failed"
    shutil.rmtree(converted)
    assert EMBED in said


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool])
def test_masks_among_the_weights_are_compared_too(dtype: torch.dtype, saved: Saved, tmp_path: Path) -> None:
    """Pythia's and GPT-2's files hold them."""
    mask = "gpt_neox.layers.0.attention.bias"
    original, converted = copy(saved("gpt_neox"), tmp_path / "original"), tmp_path / "converted"
    state = load_file(original / "model.safetensors")
    save_file({**state, mask: torch.ones(1, 1, 64, 64, dtype=dtype)}, original / "model.safetensors", {"format": "pt"})
    assert run("convert", original, converted, "--kv-heads", 3, "--method", "mean")[0] == 0
    assert verdict(original, converted) == ("passed", "")
    changed(converted, mask, lambda tensor: tensor.logical_not().to(dtype))
    found, said = verdict(original, converted)
    assert found == "failed"
    assert mask in said


def _swap(file: Path) -> None:
    """Two token ids of a tokenizer change places."""
    tokenizer = json.loads(file.read_text())
    one, other, *_ = vocabulary = tokenizer["model"]["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    file.write_text(json.dumps(tokenizer))


EDITS: dict[str, Callable[[Path], object]] = {
    "tokenizer.json differs": lambda converted: _swap(converted / "tokenizer.json"),
    "tokenizer.json is missing": lambda converted: (converted / "tokenizer.json").unlink(),
    "generation_config.json differs": lambda converted: (converted / "generation_config.json").write_text(
        '{"top_k": 1}'
    ),
    "special_tokens_map.json is not expected": lambda converted: (converted / "special_tokens_map.json").write_text(
        "{}"
    ),
    "chat_template.jinja is not expected": lambda converted: (converted / "chat_template.jinja").write_text("x"),
    "tool.py is not expected": lambda converted: (converted / "tool.py").write_text("x = 1"),
    "modeling_regroup.py is not that of": lambda converted: (converted / "modeling_regroup.py").write_text("x = 1"),
    "modeling_regroup.py is missing": lambda converted: (converted / "modeling_regroup.py").unlink(),
}


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An original with a tokenizer, and a converted model with another number of KV heads in each layer."""
    folder = tmp_path_factory.mktemp("companions")
    original, _ = runs.pair(folder)
    status, _, message = run("convert", original, folder / "mixed", "--layers", "0:2,1:3,2:1", "--method", "mean")
    assert status == 0, message
    return original, folder / "mixed"


@pytest.mark.parametrize("words", EDITS)
def test_files_next_to_the_weights_are_compared(words: str, with_tokenizer: tuple[Path, Path], tmp_path: Path) -> None:
    original, converted = with_tokenizer[0], copy(with_tokenizer[1], tmp_path / "converted")
    (converted / "notes.txt").write_text("files that no loader reads may be added")
    assert verdict(original, converted) == ("passed", "")
    EDITS[words](converted)
    found, said = verdict(original, converted)
    assert found == "failed"
    assert words in said
    assert verdict(original, converted, uptrained=True)[0] == "passed"
