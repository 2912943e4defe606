"""Facts about families: none is left out or contradicts another, and they are what transformers' config classes say."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tiny
from regroup.families import FAMILIES, Family, family_for, is_encoder_decoder
from regroup.families import known as known_families
from regroup.families.known.llama import llama_like
from regroup.families.reading import clipping, initializer_std, keys_normed, residual_scale
from regroup.families.registry import collected
from regroup.layout import detect

TYPES = sorted(FAMILIES.keys() - {"deci"})
LLAMA_LIKE: dict[str, Any] = {
    "kv_default": "heads",
    "head_dim_default": None,
    "rotary_share": 1.0,
    "keys_normed": "never",
    "clip": None,
    "residual_normed": False,
    "residual_multiplier": None,
    "window": "none",
    "ties": False,
    "initializer_std": 0.02,
    "gguf": None,
    "vllm": "stored",
}


def test_no_fact_has_a_default() -> None:
    for field in dataclasses.fields(Family):
        assert field.default is dataclasses.MISSING, field.name
        assert field.default_factory is dataclasses.MISSING, field.name


@pytest.mark.parametrize("fact", list(LLAMA_LIKE))
def test_a_family_that_leaves_a_fact_out_fails(fact: str) -> None:
    assert llama_like("new", **LLAMA_LIKE).model_type == "new"  # the other side: with all of them it is made
    with pytest.raises(TypeError, match=fact):
        llama_like("new", **{name: value for name, value in LLAMA_LIKE.items() if name != fact})


@pytest.mark.parametrize("fact", [field.name for field in dataclasses.fields(Family)])
def test_a_family_without_kin_states_every_fact(fact: str) -> None:
    facts = {field.name: getattr(FAMILIES["gpt_neox"], field.name) for field in dataclasses.fields(Family)}
    assert Family(**facts) == FAMILIES["gpt_neox"]
    del facts[fact]
    with pytest.raises(TypeError, match=fact):
        Family(**facts)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ignored": ("k_norm.weight",)}, "ignored names norms"),
        ({"shared_norms": ("k_norm.weight",)}, "keys_normed is never"),
        ({"key_norm": (("k_norm.weight", -1),)}, "keys_normed is never"),
        ({"positions": "alibi"}, "pairs"),
        ({"fused": "qkv_proj"}, "packing"),
        ({"encoder_layers": "encoder_layers"}, "cross"),
        ({"residual_normed": True, "residual_multiplier": "residual_multiplier"}, "residual_multiplier"),
    ],
)
def test_facts_that_contradict_each_other_are_refused(wrong: Mapping[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama_like("new", **{**LLAMA_LIKE, **wrong})


def test_every_family_is_found_once() -> None:
    assert all(name == family.model_type for name, family in FAMILIES.items())
    files = {path.stem for path in Path(str(known_families.__file__)).parent.glob("*.py")} - {"__init__"}
    assert {"llama", "t5", "bart", "gpt2", "bloom"} <= files
    with pytest.raises(ValueError, match="llama is described twice"):
        collected([(FAMILIES["llama"],), (FAMILIES["bloom"], FAMILIES["llama"])])


@pytest.mark.parametrize("model_type", TYPES)
def test_what_is_assumed_is_what_the_config_class_assumes(model_type: str) -> None:
    family, config = FAMILIES[model_type], transformers.CONFIG_MAPPING[model_type]()
    plain = config.to_dict()
    assert family.is_encoder_decoder == is_encoder_decoder(plain) == config.is_encoder_decoder
    assert is_encoder_decoder({"model_type": model_type}) == config.is_encoder_decoder
    # What a config that says nothing is given is what one that says everything says.
    without = {key: value for key, value in plain.items() if key not in ("initializer_range", "init_std")}
    without.pop("initializer_factor", None)
    assert initializer_std(without, family, 64) == initializer_std(plain, family, 64)
    assert initializer_std({**plain, "initializer_range": 7.0}, family, 64) == (
        initializer_std(plain, family, 64) if family.initializer_std is None else 7.0
    )
    share = (plain.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
    assert family.pairs is None or family.rotary_share == share
    assert family.speech == (config.__class__.__name__ == "WhisperConfig")
    for key in (family.clip, family.residual_multiplier):
        assert key is None or key in plain


def small(model_type: str, **more: Any) -> Any:
    """A config of the class with few heads and layers, and the class's own defaults in everything else."""
    family = FAMILIES[model_type]
    sizes = {family.hidden[0]: 96, family.heads[0]: 3, family.layers[0]: 4}
    return transformers.CONFIG_MAPPING[model_type](**sizes, **more)


@pytest.mark.parametrize("model_type", TYPES)
def test_sizes_that_a_config_leaves_out(model_type: str) -> None:
    family, config = FAMILIES[model_type], small(model_type)
    assert (getattr(config, family.head_dim[0], None) or 32) == (family.head_dim_default or 32)
    if family.native == "any":
        assert family.kv_default == ("heads" if config.num_key_value_heads in (None, 3) else None)


@pytest.mark.parametrize("model_type", TYPES)
def test_which_layers_have_a_window(model_type: str) -> None:
    family = FAMILIES[model_type]
    knows = "sliding_window" in transformers.CONFIG_MAPPING[model_type]().to_dict()
    switched = {"sliding_window": 5, "use_sliding_window": True, "max_window_layers": 2} if knows else {}
    config = small(model_type, **switched, **({"num_key_value_heads": 3} if family.kv_heads else {}))
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if knows else "full_attention"] * 4
    # A class that does not know the key has no windows though a config has it.
    plain = {key: value for key, value in config.to_dict().items() if key != "layer_types"} | {"sliding_window": 5}
    expected = [5 if kind == "sliding_attention" else None for kind in kinds]
    assert [layer.window for layer in detect(plain).layers if layer.kind == "self"] == expected


@pytest.mark.parametrize("model_type", [name for name in TYPES if FAMILIES[name].pairs is not None])
def test_which_dimensions_rotate_together(model_type: str) -> None:
    module = sys.modules[type(tiny.build(model_type)).__module__]
    turned = module.rotate_half(torch.arange(8.0)[None]).tolist()[0]
    pairs = {"half": [-4, -5, -6, -7, 0, 1, 2, 3], "interleaved": [-1, 0, -3, 2, -5, 4, -7, 6]}
    assert turned == pairs[str(FAMILIES[model_type].pairs)]


@pytest.mark.parametrize("name", [name for name, one in tiny.FAMILIES.items() if one.kind == "causal"])
@torch.no_grad()
def test_whether_a_norm_follows_attention(name: str) -> None:
    """A norm between attention and the residual stream takes away every factor; an addition does not."""
    model: Any = tiny.build(name)
    layer = detect(model.config.to_dict()).layers[0]
    attention = model.base_model.get_submodule(layer.module)

    def hidden_after(factor: float) -> torch.Tensor:
        hook = attention.register_forward_hook(lambda _module, _inputs, out: (out[0] * factor, *out[1:]))
        hidden = model(**tiny.inputs(name, 1, 5), output_hidden_states=True).hidden_states[1]
        hook.remove()
        return hidden

    seen = [hidden_after(factor) for factor in (1.0, 3.0)]
    same = torch.allclose(*seen, rtol=1e-3, atol=1e-3)
    assert same == FAMILIES[tiny.FAMILIES[name].model_type].residual_normed == (layer.residual_scale is None)


def test_encoder_decoders_of_unknown_families_say_so_themselves() -> None:
    assert is_encoder_decoder({"model_type": "new", "is_encoder_decoder": True})
    assert is_encoder_decoder({"model_type": "new", "decoder_start_token_id": 0})
    assert not is_encoder_decoder({"model_type": "new", "decoder_start_token_id": 0, "is_encoder_decoder": False})
    assert not is_encoder_decoder({"model_type": "new"})


@pytest.mark.parametrize("name", list(tiny.FAMILIES))
def test_a_norm_on_the_keys_is_known_from_the_config_alone(name: str) -> None:
    """The stock module has a norm on its keys exactly where the config, read without weights, says so."""
    model = tiny.build(name)
    config = model.config.to_dict()
    for layer in detect(config).layers:
        module = model.base_model.get_submodule(layer.module)
        has = any(getattr(module, part, None) is not None for part in ("k_norm", "k_layernorm"))
        assert (layer.key_obstacle == "a norm follows the key projection") == has, layer.name


def test_a_norm_in_the_weights_counts_though_the_config_denies_it() -> None:
    phi = family_for({"model_type": "phi"})
    assert phi is not None
    assert not keys_normed({}, phi)
    assert keys_normed({"qk_layernorm": True}, phi)
    model = tiny.build("phi_norm")
    config = {**model.config.to_dict(), "qk_layernorm": False}
    shapes = {name: _Info("F32", tuple(value.shape)) for name, value in model.state_dict().items()}
    assert all(layer.key_obstacle for layer in detect(config, shapes).layers)
    bare = {name: info for name, info in shapes.items() if "_layernorm." not in name or "self_attn" not in name}
    assert not any(layer.key_obstacle for layer in detect(config, bare).layers)


@dataclasses.dataclass(frozen=True)
class _Info:
    dtype: str
    shape: tuple[int, ...]


def test_facts_that_the_config_switches() -> None:
    falcon = {"model_type": "falcon"}
    facts = [family_for({**falcon, **more}) for more in ({}, {"new_decoder_architecture": True}, {"alibi": True})]
    assert [(f.native, f.positions, f.pairs) for f in facts if f is not None] == [
        ("mqa", "rotary", "half"),
        ("any", "rotary", "half"),
        ("mqa", "alibi", None),
    ]
    assert clipping({"clip_qkv": 2.0}, FAMILIES["olmo"]) == "clip_qkv clips every element"
    assert clipping({"clip_qkv": 2.0}, FAMILIES["llama"]) is clipping({}, FAMILIES["olmo"]) is None
    assert residual_scale({"residual_multiplier": 0.5}, FAMILIES["granite"]) == 0.5
    assert residual_scale({"residual_multiplier": 0.5}, FAMILIES["llama"]) == 1.0
    assert residual_scale({}, FAMILIES["gemma2"]) is None
