"""Adapters, quantised weights, wrapped models and other formats: named for what they are, whatever reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import regroup
from helpers import config_of, copy, edit_json, logits, refused, run, tensors, write
from regroup import RegroupError
from regroup.checkpoint import open_checkpoint

Saved = Callable[[str], Path]
Edit = Callable[[str, Tensor], dict[str, Tensor]]

ADAPTER = {"peft_type": "LORA", "r": 4, "base_model_name_or_path": "someone/base"}


def coded(bits: int, tensor: Tensor) -> Tensor:
    return torch.zeros(tensor.shape[1] * bits // 32 or 1, tensor.shape[0], dtype=torch.int32)


def beside(name: str, suffix: str, value: Tensor) -> dict[str, Tensor]:
    return {name.removesuffix("weight") + suffix: value}


def gptq(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return (
        beside(name, "qweight", coded(4, tensor))
        | beside(name, "scales", torch.ones(1, tensor.shape[0]))
        | beside(name, "g_idx", torch.zeros(tensor.shape[1], dtype=torch.int32))
    )


def eight(dtype: torch.dtype, *suffixes: str) -> Edit:
    def edit(name: str, tensor: Tensor) -> dict[str, Tensor]:
        found = {name: tensor.to(dtype)}
        for suffix in suffixes:
            found |= beside(name, suffix, torch.ones(tensor.shape[0], 1))
        return found

    return edit


def rewritten(folder: Path, target: Path, edit: Edit, *, only: str = "_proj.weight") -> Path:
    """The checkpoint with every matrix whose name ends so put in another form; beside it, its config."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors(folder).items():
        state |= edit(name, tensor) if name.endswith(only) else {name: tensor}
    return write(target, config_of(folder), state)


QUANTISED: dict[str, tuple[Edit, str, str]] = {
    "gptq": (gptq, "_proj.weight", "GPTQ"),
    "bitsandbytes int8": (eight(torch.int8, "SCB"), "_proj.weight", "bitsandbytes"),
    "bitsandbytes nf4": (
        lambda n, t: {n: torch.zeros(t.numel() // 2, 1, dtype=torch.uint8), f"{n}.absmax": torch.zeros(8)},
        "_proj.weight",
        "bitsandbytes",
    ),
    "fp8 in blocks": (eight(torch.float8_e4m3fn, "weight_scale_inv"), "_proj.weight", "FP8"),
    "fp8 without scales": (eight(torch.float8_e5m2), "_proj.weight", "F8_E5M2"),
    "feed-forward alone, int8": (eight(torch.int8, "weight_scale"), "down_proj.weight", "I8"),
    "feed-forward alone, fp8": (eight(torch.float8_e4m3fn), "up_proj.weight", "F8_E4M3"),
    "the head alone": (eight(torch.int8), "lm_head.weight", "I8"),
    "packed": (
        lambda n, t: beside(n, "weight_packed", coded(4, t)) | beside(n, "weight_scale", torch.ones(1)),
        "_proj.weight",
        "compressed-tensors",
    ),
    "mlx": (
        lambda n, t: {n: torch.zeros(t.shape[0], 4, dtype=torch.uint32)} | beside(n, "biases", torch.ones(1)),
        "_proj.weight",
        "U32",
    ),
}


@pytest.mark.parametrize("kind", QUANTISED)
def test_quantised_weights_are_named(kind: str, saved: Saved, tmp_path: Path) -> None:
    edit, only, word = QUANTISED[kind]
    folder = rewritten(saved("llama"), tmp_path / "in", edit, only=only)
    for command in (("convert", folder, tmp_path / "out", "--kv-heads", 2), ("inspect", folder)):
        message = refused(*command)
        assert "quantised" in message
        assert word in message
        assert "unquantised checkpoint" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value", "word"),
    [
        ("quantization_config", {"quant_method": "awq"}, "awq"),
        ("compression_config", {"quant_method": "compressed-tensors"}, "compressed-tensors"),
        ("quantization", {"bits": 4}, "MLX"),
        *(("file", name, name) for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json")),
    ],
)
def test_what_says_that_weights_are_quantised(key: str, value: object, word: str, saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    open_checkpoint(folder)
    if key == "file":
        (folder / str(value)).write_text("{}")
    else:
        edit_json(folder / "config.json", **{key: value})
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 2, "--calibration", "none")
    assert "quantised" in message
    assert word in message
    assert "remove what says" in message


def test_integers_that_are_no_weights_are_read(saved: Saved, tmp_path: Path) -> None:
    """Masks and positions, as GPT-2's and BERT-like files hold them."""
    state = tensors(saved("gpt2"))
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.uint8)
    state["transformer.h.1.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    state["position_ids"] = torch.arange(8)[None]
    open_checkpoint(write(tmp_path / "in", config_of(saved("gpt2")), state))


def test_scales_of_a_quantised_cache(saved: Saved, tmp_path: Path) -> None:
    def edit(name: str, tensor: Tensor) -> dict[str, Tensor]:
        return {name: tensor, name.replace("k_proj.weight", "k_scale"): torch.tensor(1.0)}

    folder = rewritten(saved("llama"), tmp_path / "in", edit, only="k_proj.weight")
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 2, "--calibration", "none")
    assert "scales of a quantised KV cache" in message
    assert "k_scale" in message


PREFIXES = {
    "_orig_mod.": "torch.compile",
    "module.": "DistributedDataParallel",
    "_fsdp_wrapped_module.": "FSDP",
    "_forward_module.": "DeepSpeed",
    "base_model.model.": "peft",
    "language_model.": "text model",
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_are_named_and_the_remedy_works(prefix: str, saved: Saved, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in tensors(saved("llama")).items()}
    folder = write(tmp_path / "in", config_of(saved("llama")), state)
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 2, "--calibration", "none")
    assert PREFIXES[prefix] in message
    assert f"take {prefix!r} out of the names" in message
    plain = {name.replace(prefix, ""): tensor for name, tensor in state.items()}
    regroup.convert(
        write(tmp_path / "plain", config_of(folder), plain), tmp_path / "out", kv_heads=2, calibration="none"
    )


def test_a_wrapper_inside_the_names(saved: Saved, tmp_path: Path) -> None:
    state = {
        name.replace("self_attn", "_checkpoint_wrapped_module.self_attn"): tensor
        for name, tensor in tensors(saved("llama")).items()
    }
    folder = write(tmp_path / "in", config_of(saved("llama")), state)
    assert "activation checkpointing" in refused("inspect", folder)


@pytest.mark.parametrize(
    "part", ["lora_A.default.weight", "lora_B.weight", "base_layer.weight", "ia3_l.default", "lokr_w1", "oft_r.x"]
)
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_unmerged_adapters(part: str, prefix: str, saved: Saved, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in tensors(saved("llama")).items()}
    state[f"{prefix}model.layers.1.mlp.up_proj.{part}"] = torch.ones(2, 2)
    folder = write(tmp_path / "in", config_of(saved("llama")), state)
    for command in (("convert", folder, tmp_path / "out", "--kv-heads", 2), ("inspect", folder)):
        message = refused(*command)
        assert "an adapter that was not merged" in message
        assert "merge_and_unload" in message


def test_an_adapter_alone(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    (folder / "adapter_model.safetensors").write_bytes(b"")
    for command in (("inspect", folder), ("convert", folder, tmp_path / "out", "--kv-heads", 2)):
        message = refused(*command)
        assert "this is an adapter, not a model" in message
        assert "someone/base" in message
    with pytest.raises(RegroupError, match="this is an adapter"):
        regroup.load(folder)


@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_next_to_the_weights(pickled: bool, saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    if pickled:
        torch.save(tensors(folder), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    text = tmp_path / "t.txt"
    text.write_text("a b c " * 100)
    for command in (
        ("convert", folder, tmp_path / "out", "--kv-heads", 2, "--allow-pickle"),
        ("plan", folder, "--kv-heads", 2, "--allow-pickle"),
        ("inspect", folder),
        ("evaluate", folder, "--data", text),
        ("export", folder, tmp_path / "out", "--to", "hf", "--allow-pickle"),
    ):
        message = refused(*command)
        assert "the folder holds an adapter next to the weights" in message, command
        assert str(folder / "adapter_config.json") in message
        assert "remove adapter_config.json" in message
    assert not (tmp_path / "out").exists()


def test_an_adapter_in_a_converted_folder_fails_the_check(saved: Saved, tmp_path: Path) -> None:
    regroup.convert(saved("llama"), tmp_path / "out", kv_heads=2, method="mean")
    assert run("verify", saved("llama"), tmp_path / "out")[0] == 0
    (tmp_path / "out" / "adapter_config.json").write_text(json.dumps(ADAPTER))
    status, out, _ = run("verify", saved("llama"), tmp_path / "out")
    assert status == 1
    assert "adapter" in out


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("zero_to_fp32.py", "DeepSpeed"),
        ("global_step1/mp_rank_00_model_states.pt", "DeepSpeed"),
        ("pytorch_model_fsdp_0/__0_0.distcp", "distributed checkpoint"),
        ("consolidated.00.pth", "Meta"),
        ("consolidated.safetensors", "Mistral"),
        ("model.Q4_K_M.gguf", "GGUF"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
    ],
)
def test_weights_in_other_formats(file: str, word: str, saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    (folder / "model.safetensors").unlink()
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_bytes(b"x")
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 2, "--calibration", "none")
    assert word in message
    assert file in message
    # Beside weights that can be read it is no obstacle.
    shutil.copyfile(saved("llama") / "model.safetensors", folder / "model.safetensors")
    open_checkpoint(folder)


def test_plain_weights_with_none_of_it_are_read(saved: Saved) -> None:
    for name in ("llama", "qwen2_moe", "whisper", "stablelm_norm", "gpt_bigcode"):
        open_checkpoint(saved(name))
        assert logits(regroup.load(saved(name)), name).isfinite().all()
