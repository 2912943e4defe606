"""Exports to checkpoint folders: stock forms, repeated heads, and the Nemotron-NAS layout and back."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import regroup
import tiny
from exports.block_llama import block_llama_logits
from helpers import (
    assert_same_tensors,
    config_of,
    copy,
    digests,
    edit_json,
    everything,
    layout_of,
    logits,
    refused,
    run,
    tensors,
)
from regroup.exports.check import compare
from regroup.layout.nemotron_nas import multiplier, to_blocks, width
from regroup.modeling import load

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]


def stock(folder: Path) -> Any:
    """By transformers alone: no code of the folder's, none of regroup's."""
    config: Any = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    return model.eval()


def said(*arguments: object) -> str:
    status, out, message = run("export", *arguments)
    assert (status, out) == (0, ""), message
    return " ".join(message.split())


@pytest.mark.parametrize("name", ["llama", "qwen2", "phi3", "falcon", "cohere_norm"])
def test_a_uniform_model_is_copied(name: str, converted: Converted, tmp_path: Path) -> None:
    kind = "one" if name == "falcon" else "some"
    message = said(converted(name, kind), tmp_path / "out", "--to", "hf")
    assert "checked with transformers" in message
    assert "identical logits" in message
    assert_same_tensors(tensors(tmp_path / "out"), tensors(converted(name, kind)))
    assert config_of(tmp_path / "out") == config_of(converted(name, kind))
    assert torch.equal(logits(stock(tmp_path / "out"), name), logits(load(converted(name, kind)).eval(), name))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("llama", "mixed"),
        ("llama_bias", "mixed"),
        ("phi3", "mixed"),
        ("cohere_norm", "mixed"),
        ("olmo2", "mixed"),
        ("gpt2", "some"),
        ("gpt_neox", "mixed"),
        ("falcon", "mixed"),
        ("bart", "mixed"),
        ("t5", "one"),
        ("whisper", "one"),
    ],
)
def test_repeated_heads_compute_the_same(name: str, kind: str, converted: Converted, tmp_path: Path) -> None:
    source = converted(name, kind)
    message = refused("export", source, tmp_path / "out", "--to", "hf")
    assert "no stock class of transformers supports these KV heads" in message
    assert "in layer" in message
    assert "--expand" in message
    # Engines hold other numbers of heads in Llama's layers alone.
    assert ("--to gguf" in message) == (tiny.FAMILIES[name].model_type in ("llama", "mistral"))
    assert everything(tmp_path) == []
    assert "KV heads were repeated" in said(source, tmp_path / "out", "--to", "hf", "--expand")
    mine, theirs = logits(load(source).eval(), name), logits(stock(tmp_path / "out"), name)
    assert float((mine - theirs).abs().max()) <= 1e-5 * float(mine.abs().max())
    assert "regroup_plan.json" not in digests(tmp_path / "out")


def test_repeated_heads_in_another_order_are_found(converted: Converted, tmp_path: Path) -> None:
    """The negative control of the two tests above: what a wrong order of repeats would look like to the check."""
    source = converted("llama", "mixed")
    said(source, tmp_path / "out", "--to", "hf", "--expand", "--no-check")
    wrong = stock(tmp_path / "out")
    name = "model.layers.0.self_attn.k_proj.weight"
    heads = wrong.get_parameter(name).data.unflatten(0, (-1, 10))
    wrong.get_parameter(name).data = heads[torch.tensor([1, 2, 3, 4, 5, 0])].flatten(0, 1)
    with pytest.raises(Exception, match="output differs from its source"):
        compare(logits(load(source).eval(), "llama"), logits(wrong, "llama"), "transformers")


def test_the_least_common_multiple_is_enough(saved: Saved, tmp_path: Path) -> None:
    regroup = tmp_path / "result"
    assert run("convert", saved("llama"), regroup, "--layers", "0:2,1:1,2:1", "--method", "mean")[0] == 0
    said(regroup, tmp_path / "out", "--to", "hf", "--expand")
    assert config_of(tmp_path / "out")["num_key_value_heads"] == 2


def test_pickles_are_unpacked_next_to_the_destination(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in the folder for temporary files, which on many systems is memory."""
    source = copy(saved("llama"), tmp_path / "source")
    torch.save(tensors(source), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    monkeypatch.setattr(tempfile, "gettempdir", lambda: pytest.fail("the folder for temporary files was used"))
    regroup.export(str(source), str(tmp_path / "new" / "out"), to="hf", allow_pickle=True, check=False)
    assert_same_tensors(tensors(tmp_path / "new" / "out"), tensors(saved("llama")))
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["out"]


def test_a_card_that_cannot_be_read_is_refused(saved: Saved, tmp_path: Path) -> None:
    source = copy(saved("llama"), tmp_path / "source")
    (source / "README.md").write_bytes(b"caf\xe9")
    assert "model card cannot be read" in refused("export", source, tmp_path / "out", "--to", "hf", "--no-check")
    assert not (tmp_path / "out").exists()


def test_without_a_check_it_says_so(converted: Converted, tmp_path: Path) -> None:
    message = said(converted("llama", "some"), tmp_path / "out", "--to", "hf", "--no-check")
    assert "not checked: --no-check" in message


@pytest.mark.parametrize("width_", [256, 5632, 11008, 13824, 14336, 28672])
@pytest.mark.parametrize("hidden", [48, 2048, 4096, 5120, 8192])
def test_multipliers_give_their_width_back(width_: int, hidden: int) -> None:
    found = multiplier(width_, hidden)
    assert found is not None
    assert found == round(found, 6)
    assert width(found, hidden) == width_
    assert multiplier(width_ + 1, hidden) is None


def wide_model(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A converted model with other KV heads in each layer, and a width that a multiplier can say."""
    family = tiny.FAMILIES[name]
    config = getattr(transformers, family.config_class)(**{**family.kwargs, "intermediate_size": 512, **changes})
    model = getattr(transformers, family.model_class)(config)
    tiny.randomize(model, std=family.weight_std, seed=3)
    model.save_pretrained(tmp_path / "original")
    layers = ",".join(f"{i}:{[2, 3, 1][i % 3]}" for i in range(config.num_hidden_layers))
    assert run("convert", tmp_path / "original", tmp_path / "result", "--layers", layers, "--method", "first")[0] == 0
    return tmp_path / "result"


@pytest.mark.parametrize("name", ["llama", "llama_bias", "mistral"])
def test_blocks_and_back(name: str, tmp_path: Path) -> None:
    changes = {"sliding_window": None} if name == "mistral" else {}
    if name == "llama_bias":
        changes = {"num_attention_heads": 6, "num_key_value_heads": 6}
    result = wide_model(name, tmp_path, **changes)
    message = said(result, tmp_path / "blocks", "--to", "vllm")
    assert "Nemotron-NAS" in message
    assert "not vLLM" in message
    config = config_of(tmp_path / "blocks")
    assert config["architectures"] == ["DeciLMForCausalLM"]
    groups = [block["attention"]["n_heads_in_group"] for block in config["block_configs"]]
    assert groups == [3, 2, 6][: len(groups)]
    assert_same_tensors(tensors(tmp_path / "blocks"), tensors(result))
    expected = logits(load(result).eval(), name)
    ids = tiny.inputs(name, 2, 7)["input_ids"]
    found = block_llama_logits(config, tensors(tmp_path / "blocks"), ids)
    assert float((found - expected).abs().max()) <= 1e-4 * float(expected.abs().max())
    # One block that says another group is not the same model, or none at all.
    config["block_configs"][0]["attention"]["n_heads_in_group"] = 6
    with pytest.raises(RuntimeError):
        block_llama_logits(config, tensors(tmp_path / "blocks"), ids)

    assert "regroup's form of llama" in said(tmp_path / "blocks", tmp_path / "back", "--to", "hf")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(result))
    assert torch.equal(logits(load(tmp_path / "back").eval(), name), expected)
    remote = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "back", trust_remote_code=True)
    assert torch.equal(logits(remote.eval(), name), expected)


def test_blocks_are_read_through_the_config_class(tmp_path: Path) -> None:
    said(wide_model("llama", tmp_path), tmp_path / "blocks", "--to", "vllm", "--no-check")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "blocks", trust_remote_code=True)
    assert [block.attention.n_heads_in_group for block in config.block_configs] == [3, 2, 6]
    assert not any(block.attention.no_op or block.ffn.no_op for block in config.block_configs)
    assert width(config.block_configs[0].ffn.ffn_mult, config.hidden_size) == 512
    assert not hasattr(config.block_configs[0].ffn, "intermediate_size")
    config.save_pretrained(tmp_path / "again")
    assert config_of(tmp_path / "again")["block_configs"] == config_of(tmp_path / "blocks")["block_configs"]


def test_a_width_that_no_multiplier_gives_is_named(converted: Converted, tmp_path: Path) -> None:
    message = said(converted("llama", "mixed"), tmp_path / "blocks", "--to", "vllm")
    assert "not a multiple of 256" in message
    assert config_of(tmp_path / "blocks")["block_configs"][0]["ffn"]["intermediate_size"] == 64
    said(tmp_path / "blocks", tmp_path / "back", "--to", "hf")
    assert_same_tensors(tensors(tmp_path / "back"), tensors(converted("llama", "mixed")))


def test_older_decilm_is_read(converted: Converted, tmp_path: Path) -> None:
    result = converted("llama", "mixed")
    old = copy(result, tmp_path / "old")
    heads = [layer.num_key_value_heads for layer in layout_of(result).layers]
    edit_json(
        old / "config.json",
        model_type="deci",
        architectures=["DeciLMForCausalLM"],
        num_key_value_heads_per_layer=heads,
        auto_map=None,
        regroup=None,
    )
    said(old, tmp_path / "back", "--to", "hf")
    assert torch.equal(logits(load(tmp_path / "back").eval(), "llama"), logits(load(result).eval(), "llama"))
    said(old, tmp_path / "blocks", "--to", "vllm")
    assert_same_tensors(tensors(tmp_path / "blocks"), tensors(result))


@pytest.mark.parametrize(
    ("where", "value", "words"),
    [
        (("attention", "no_op"), True, ("model.layers.1", "attention.no_op")),
        (("attention", "replace_with_linear"), True, ("attention.replace_with_linear",)),
        (("attention", "window_length"), 8, ("attention.window_length",)),
        (("attention", "n_heads_in_group"), None, ("a divisor of 6", "None")),
        (("attention", "n_heads_in_group"), 4, ("a divisor of 6", "4")),
        (("ffn", "no_op"), True, ("ffn.no_op",)),
        (("ffn", "intermediate_size"), 128, ("width 64, as in layer 0", "128")),
        (("ffn", "intermediate_size"), None, ("ffn_mult or intermediate_size",)),
    ],
)
def test_blocks_that_are_not_llamas_are_refused(
    where: tuple[str, str], value: object, words: tuple[str, ...], converted: Converted, tmp_path: Path
) -> None:
    blocks = copy(converted("llama", "mixed"), tmp_path / "blocks")
    config = to_blocks(config_of(blocks), [3, 2, 1])
    config["block_configs"][1][where[0]][where[1]] = value
    edit_json(blocks / "config.json", **config, regroup=None, auto_map=None)
    message = refused("export", blocks, tmp_path / "out", "--to", "hf")
    assert "a block of this Nemotron-NAS config is not a Llama layer" in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "mistral"])
def test_what_no_layout_holds_is_refused(name: str, converted: Converted, tmp_path: Path) -> None:
    message = refused("export", converted(name, "mixed"), tmp_path / "out", "--to", "vllm")
    assert "no engine's layout for that supports this family" in message
    assert "--expand" in message
    assert everything(tmp_path) == []


def test_what_vllm_does_not_serve_is_refused(saved: Saved, tmp_path: Path) -> None:
    message = refused("export", saved("t5"), tmp_path / "out", "--to", "vllm")
    assert "vLLM serves no encoder-decoder of this family" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "onnx"], ("export target", "hf or vllm or gguf")),
        (["--to", "hf", "--dtype", "float32"], ("copied as they are stored", "remedy:")),
        (["--to", "gguf", "--dtype", "q4"], ("dtype", "float32 or bfloat16 or float16")),
        (["--to", "hf", "--tensor-parallel", "4"], ("over that many devices", "divisor of 6")),
        (["--to", "gguf", "--tensor-parallel", "2"], ("not divided by heads", "remedy:")),
    ],
)
def test_impossible_requests(options: list[str], words: tuple[str, ...], converted: Converted, tmp_path: Path) -> None:
    message = refused("export", converted("llama", "some"), tmp_path / "out", *options)
    assert [word for word in words if word not in message] == []
    assert everything(tmp_path) == []


def test_a_result_with_other_logits_never_appears(
    converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regroup.exports import heads

    right = heads.rewrite_of

    def wrong(name: str, moves: Any, known: Any) -> Any:
        shifted = [type(m)(m.before, m.after, (*m.sources[1:], m.sources[0]), m.rule) for m in moves]
        return right(name, shifted, known)

    monkeypatch.setattr(heads, "rewrite_of", wrong)
    message = refused("export", converted("llama", "mixed"), tmp_path / "out", "--to", "hf", "--expand")
    assert "output differs from its source" in message
    assert everything(tmp_path) == []


class TestTensorParallel:
    """KV heads for several devices."""

    def test_few_heads_are_repeated(self, converted: Converted, tmp_path: Path) -> None:
        message = said(converted("llama", "one"), tmp_path / "out", "--to", "hf", "--tensor-parallel", 3)
        assert "each KV head was repeated 3 times" in message
        assert config_of(tmp_path / "out")["num_key_value_heads"] == 3

    def test_enough_heads_stay(self, converted: Converted, tmp_path: Path) -> None:
        message = said(converted("llama", "some"), tmp_path / "out", "--to", "hf", "--tensor-parallel", 1)
        assert "repeated" not in message
        assert_same_tensors(tensors(tmp_path / "out"), tensors(converted("llama", "some")))

    def test_vllm_copies_by_itself(self, converted: Converted, tmp_path: Path) -> None:
        message = said(converted("llama", "one"), tmp_path / "out", "--to", "vllm", "--tensor-parallel", 2)
        assert "vLLM gives each device a copy" in message
        assert config_of(tmp_path / "out")["num_key_value_heads"] == 1

    def test_what_does_not_divide_is_refused(self, saved: Saved, tmp_path: Path) -> None:
        assert run("convert", saved("llama"), tmp_path / "result", "--kv-heads", 3, "--calibration", "none")[0] == 0
        message = refused("export", tmp_path / "result", tmp_path / "out", "--to", "hf", "--tensor-parallel", 2)
        assert "the KV heads cannot be divided over the tensor-parallel devices" in message
