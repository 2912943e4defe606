"""Layouts of every family, from config and headers or from the config alone, against the other route's reading."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
import regroup
import tiny
from helpers import assert_same_tensors, config_of, convert_heads, head_map, layout_of, logits, tensors, write
from regroup import RegroupError
from regroup.layout import HeadSlot, Layout, detect

FAMILIES = list(tiny.FAMILIES)
Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]


def head(state: dict[str, Tensor], slot: HeadSlot, number: int) -> Tensor:
    tensor = state[slot.tensor.format(head=number)]
    return tensor.narrow(slot.axis, slot.start(number), slot.size).movedim(slot.axis, 0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_head_lies_where_the_layout_says(name: str, saved: Saved) -> None:
    family, original, layout = tiny.FAMILIES[name], tiny.build(name), layout_of(saved(name))
    stored = tensors(saved(name))
    known = naive.attentions(original)
    assert layout.family == family.model_type
    assert [layer.module for layer in layout.layers] == family.attention_modules
    assert layout.parameters == sum(tensor.numel() for tensor in stored.values())
    assert layout.dtype == "F32"
    for layer in layout.layers:
        attention = known[layer.module]
        assert (layer.num_attention_heads, layer.num_key_value_heads) == (attention.heads, attention.kv_heads)
        assert layer.head_dim == attention.head_dim == family.head_dim
        assert layer.kind == ("cross" if "enc" in layer.module.lower().split(".", 1)[1] else "self")
        for suffix in ("weight", "bias"):
            read = attention.read(dict(original.state_dict()), suffix)
            for projection, heads in zip((layer.query, layer.key, layer.value), read, strict=True):
                slot = projection.weight if suffix == "weight" else projection.bias
                assert (slot is None) == (heads is None)
                for number in range(0 if slot is None or heads is None else slot.heads):
                    assert slot is not None
                    assert heads is not None
                    assert torch.equal(head(stored, slot, number), heads[number])
                    if number:
                        assert not torch.equal(head(stored, slot, number), heads[0])
        output = stored[layer.output.weight.tensor]
        axis = 0 if family.model_type == "gpt2" else 1
        assert layer.output.weight.axis == axis
        assert output.shape[axis] == attention.heads * attention.head_dim
        for role, projection in (("q", layer.query), ("k", layer.key)):
            norm = attention.read_norm(dict(original.state_dict()), "q" if role == "q" else "k")
            norms = [slot for slot in projection.extras if "norm" in slot.tensor]
            assert len(norms) == (0 if norm is None else 1)
            for number in range(0 if norm is None else len(norm)):
                assert norm is not None
                assert torch.equal(head(stored, norms[0], number).flatten(), norm[number].flatten())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_config_alone_says_the_same_of_heads(name: str, saved: Saved) -> None:
    alone, whole = detect(config_of(saved(name))), layout_of(saved(name))

    def facts(layout: Layout) -> list[tuple[Any, ...]]:
        return [
            (x.module, x.kind, x.num_attention_heads, x.num_key_value_heads, x.head_dim, x.window, x.rotary)
            for x in layout.layers
        ]

    assert facts(alone) == facts(whole)
    assert alone.fingerprint() == whole.fingerprint()
    assert (alone.dtype, alone.parameters) == (None, None)
    assert alone.encoder_layers == whole.encoder_layers
    json.dumps(whole.to_json())


WINDOWS = {
    "mistral": [6, 6],
    "mistral_grouped": [None, None],
    "qwen2": [None, 5, 5],
    "gemma2": [5, None],
    "phi3": [7, 7],
    "starcoder2": [6, 6],
    "llama": [None] * 3,
}
ROTARY = {
    "phi": 4,
    "stablelm": 4,
    "stablelm_norm": 2,
    "gpt_neox": 2,
    "gpt_neox_sequential": 8,
    "llama": 10,
    "opt": None,
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows(name: str, saved: Saved) -> None:
    assert [layer.window for layer in layout_of(saved(name)).layers] == WINDOWS[name]
    bare = {key: value for key, value in config_of(saved(name)).items() if key != "layer_types"}
    assert [layer.window for layer in detect(bare).layers] == WINDOWS[name]


@pytest.mark.parametrize("name", [*ROTARY, "falcon", "falcon_alibi", "bloom", "gpt2", "t5", "bart"])
def test_rotated_dimensions(name: str, saved: Saved) -> None:
    expected = ROTARY.get(name, 8 if name == "falcon" else None)
    for layer in layout_of(saved(name)).layers:
        assert (layer.rotary.dim if layer.rotary else None) == expected


PREFIXED = {"t5", "t5_v1_1", "mt5", "umt5"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in PREFIXED])
def test_names_without_the_base_prefix(name: str, saved: Saved, converted: Converted, tmp_path: Path) -> None:
    """Checkpoints on the hub were often saved from the base model alone."""
    prefix = tiny.build(name).base_model_prefix + "."

    def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key.removeprefix(prefix): tensor for key, tensor in state.items()}

    stored = tensors(saved(name))
    assert any(key.startswith(prefix) for key in stored)
    original = write(tmp_path / "original", config_of(saved(name)), bare(stored))
    assert [x.module for x in layout_of(original).layers] == [x.module for x in layout_of(saved(name)).layers]
    convert_heads(original, tmp_path / "result", head_map(name, "mixed"))
    assert_same_tensors(tensors(tmp_path / "result"), bare(tensors(converted(name, "mixed"))))


def test_a_base_model_without_prefix_loads(saved: Saved, tmp_path: Path) -> None:
    stored = {key.removeprefix("transformer."): tensor for key, tensor in tensors(saved("gpt2")).items()}
    original = write(tmp_path / "original", config_of(saved("gpt2")), stored)
    convert_heads(saved("gpt2"), tmp_path / "expected", head_map("gpt2", "mixed"))
    convert_heads(original, tmp_path / "result", head_map("gpt2", "mixed"))
    loaded = [logits(regroup.load(tmp_path / folder), "gpt2") for folder in ("result", "expected")]
    assert torch.equal(*loaded)


def refusal(config: dict[str, Any], headers: Any = None) -> RegroupError:
    with pytest.raises(RegroupError) as error:
        detect(config, headers)
    return error.value


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3", "olmo2", "stablelm_norm", "cohere_norm", "t5", "whisper"])
def test_wrong_shapes_are_refused_in_every_packing(name: str, saved: Saved) -> None:
    from regroup.checkpoint import TensorEntry, open_checkpoint

    checkpoint, layout = open_checkpoint(saved(name)), layout_of(saved(name))
    used = {
        tensor
        for layer in layout.layers[:2]
        for projection in layer.projections().values()
        for slot in projection.slots()
        for tensor in slot.tensors()
    }
    for tensor in used:
        entry = checkpoint.tensors[tensor]
        longer = tuple(length + 1 for length in entry.shape)
        for shape in ((), (1,), longer, (*entry.shape, 1, 1)):
            changed = checkpoint.tensors | {tensor: TensorEntry(entry.dtype, shape, 0, 0)}
            error = refusal(checkpoint.config, changed)
            assert error.details["tensor"] == tensor
            assert error.details["layer"]
            assert error.details["expected"]
            assert str(list(shape)) in str(error.details["got"])
    detect(checkpoint.config, checkpoint.tensors)


@pytest.mark.parametrize("name", FAMILIES)
def test_missing_and_surplus_parameters_are_refused(name: str, saved: Saved) -> None:
    from regroup.checkpoint import TensorEntry, open_checkpoint

    checkpoint, layout = open_checkpoint(saved(name)), layout_of(saved(name))
    layer = layout.layers[-1]
    for tensor in {layer.key.weight.tensor, layer.output.weight.tensor}:
        fewer = {key: entry for key, entry in checkpoint.tensors.items() if key != tensor}
        error = refusal(checkpoint.config, fewer)
        assert (error.details["tensor"], error.details["layer"]) == (tensor, layer.name)
        integer = checkpoint.tensors | {tensor: TensorEntry("I8", checkpoint.tensors[tensor].shape, 0, 0)}
        assert "quantised" in refusal(checkpoint.config, integer).what
    surplus = checkpoint.tensors | {f"{layer.name}.lora_A.weight": TensorEntry("F32", (2, 8), 0, 0)}
    assert "does not have" in refusal(checkpoint.config, surplus).what
    beyond = layer.name.replace(f".{layer.index}.", f".{layer.index + 1}.", 1) + ".extra.weight"
    more = checkpoint.tensors | {beyond: TensorEntry("F32", (2, 8), 0, 0)}
    assert "more layers" in refusal(checkpoint.config, more).what


@pytest.mark.parametrize("name", ["mistral", "qwen2", "gemma", "starcoder2"])
def test_a_default_that_is_not_known_is_not_guessed(name: str, saved: Saved) -> None:
    config = {key: value for key, value in config_of(saved(name)).items() if key != "num_key_value_heads"}
    assert "does not name the number of KV heads" in refusal(config).what


def test_defaults_that_are_known() -> None:
    llama = {"model_type": "llama", "num_attention_heads": 8, "num_hidden_layers": 1, "hidden_size": 64}
    assert detect(llama).layers[0].num_key_value_heads == 8
    bigcode = {"model_type": "gpt_bigcode", "n_head": 8, "n_layer": 1, "n_embd": 64}
    assert detect(bigcode).layers[0].num_key_value_heads == 1
    assert detect(bigcode | {"multi_query": False}).layers[0].num_key_value_heads == 8
    falcon = {"model_type": "falcon", "num_attention_heads": 8, "num_hidden_layers": 1, "hidden_size": 64}
    assert detect(falcon).layers[0].num_key_value_heads == 1
    new = falcon | {"new_decoder_architecture": True, "num_kv_heads": 4}
    assert detect(new).layers[0].num_key_value_heads == 4
    assert "not a multiple" in refusal(llama | {"num_attention_heads": 7}).what
    assert "lacks a number" in refusal({"model_type": "llama"}).what


@pytest.mark.parametrize("name", ["gpt2", "gpt_bigcode"])
def test_added_cross_attention_is_refused(name: str, saved: Saved) -> None:
    assert "cross-attention" in refusal(config_of(saved(name)) | {"add_cross_attention": True}).what


@pytest.mark.parametrize("name", FAMILIES)
def test_a_converted_checkpoint_is_detected_again(name: str, converted: Converted) -> None:
    for kind in ("some", "one", "mixed"):
        folder = converted(name, kind)
        for layout in (layout_of(folder), detect(config_of(folder))):
            assert {x.module: x.num_key_value_heads for x in layout.layers} == head_map(name, kind)
            assert layout.family == tiny.FAMILIES[name].model_type
