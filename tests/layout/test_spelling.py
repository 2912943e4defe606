"""Configs in older words: the same model as the one that they were made of, or a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import regroup
import tiny
from helpers import config_of, convert_heads, refused, run
from regroup import RegroupError
from regroup.families import FAMILIES
from regroup.layout import detect
from regroup.layout.spelling import as_known

Saved = Callable[[str], Path]
# How Falcon's first checkpoints said it; keys that FalconConfig has and the old code had not are left out.
OLD = {"num_attention_heads": "n_head", "num_hidden_layers": "n_layer", "num_kv_heads": "n_head_kv"}
KEPT = ("alibi", "bias", "hidden_size", "layer_norm_epsilon", "multi_query", "parallel_attn", "vocab_size")
CODE = {"AutoConfig": "configuration_RW.RWConfig", "AutoModelForCausalLM": "modelling_RW.RWForCausalLM"}
SIZES = {"vocab_size": 96, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6}
SORTS: dict[str, tuple[str, dict[str, Any], int]] = {
    "7B": ("RefinedWebModel", {"multi_query": True, "parallel_attn": True}, 1),
    "rw-1B": ("RefinedWebModel", {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}, 6),
    "40B": ("RefinedWeb", {"new_decoder_architecture": True, "num_kv_heads": 3}, 3),
}


def made(sort: str, folder: Path) -> tuple[Any, Path, dict[str, Any]]:
    """A model of transformers' class, and its checkpoint under a config in the old words."""
    old_type, switches, kv_heads = SORTS[sort]
    config: Any = transformers.FalconConfig(**SIZES, **switches, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    model: Any = transformers.FalconForCausalLM(config)
    tiny.randomize(model, std=0.2, seed=0)
    model.eval().save_pretrained(folder)
    new = config_of(folder)
    old = {key: new[key] for key in KEPT} | {"n_head": 6, "n_layer": 2}
    old |= {"architectures": ["RWForCausalLM"], "auto_map": CODE, "model_type": old_type}
    if old_type == "RefinedWeb":
        del old["multi_query"]
        old["n_head_kv"] = kv_heads
    (folder / "config.json").write_text(json.dumps(old))
    return model, folder, old


@torch.no_grad()
def answers(model: Any) -> Tensor:
    return model(torch.arange(3, 23)[None]).logits


@pytest.mark.parametrize("as_falcon", [False, True])
@pytest.mark.parametrize("sort", SORTS)
def test_old_falcon_is_read_and_rewritten(sort: str, as_falcon: bool, tmp_path: Path) -> None:
    model, folder, old = made(sort, tmp_path / "in")
    if as_falcon:  # what a user would do who sets the model_type back
        old = {**old, "model_type": "falcon"}
        (folder / "config.json").write_text(json.dumps(old))
    H, G = 6, SORTS[sort][2]
    for layout in (detect(old), detect(old, regroup.open_checkpoint(folder).tensors)):
        assert {(x.num_attention_heads, x.num_key_value_heads, x.head_dim) for x in layout.layers} == {(H, G, 8)}
        assert len(layout.layers) == 2
        assert layout.tied_embeddings is True
    expected = answers(model)
    assert torch.equal(answers(regroup.load(folder)), expected)
    regroup.convert(folder, tmp_path / "out", kv_heads=G, method="mean")
    config = config_of(tmp_path / "out")
    assert config["model_type"] == "falcon"
    assert config["architectures"] == ["FalconForCausalLM"]
    assert not config.keys() & {"auto_map", *OLD.values()}
    assert torch.equal(answers(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()), expected)
    assert run("verify", folder, tmp_path / "out")[0] == 0
    # The other side: transformers alone, under the old words, builds another model.
    plain = {k: v for k, v in old.items() if k != "auto_map"} | {"model_type": "falcon"}
    stock: Any = transformers.FalconConfig
    assert stock(**plain).num_attention_heads != H


def test_old_falcon_with_fewer_heads(tmp_path: Path) -> None:
    model, folder, _ = made("40B", tmp_path / "in")
    heads = {"h.0.self_attention": 1, "h.1.self_attention": 1}
    with torch.no_grad():
        for block in model.transformer.h:
            fused = block.self_attention.query_key_value.weight.view(3, 4, 8, 48)
            fused[:, 2:] = fused[:1, 2:]  # every key and value head is the first
    expected = answers(model)
    model.save_pretrained(tmp_path / "equal")
    (tmp_path / "equal" / "config.json").write_bytes((folder / "config.json").read_bytes())
    convert_heads(tmp_path / "equal", tmp_path / "out", heads)
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert stock.config.num_kv_heads == 1
    torch.testing.assert_close(answers(stock), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 12},
        {"num_hidden_layers": 3},
        {"num_kv_heads": 6},
        {"n_embed": 96},
        {"new_decoder_architecture": False},
        {"model_type": "RefinedWebModel", "multi_query": True},
        {"apply_residual_connection_post_layernorm": True},
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    _, folder, old = made("40B", tmp_path / "in")
    detect(old)
    (folder / "config.json").write_text(json.dumps({**old, **changes}))
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 1, "--calibration", "none")
    assert "expected:" in message
    with pytest.raises(RegroupError, match=r"mean the same and differ|two decoder architectures|no such residual"):
        regroup.load(folder)
    assert not (tmp_path / "out").exists()


ALIASES = [
    (name, alias, key)
    for name in ("gpt2", "gpt_bigcode", "bloom", "t5", "mt5", "umt5")
    for alias, key in transformers.CONFIG_MAPPING[name].attribute_map.items()
    if key in {*FAMILIES[name].heads, *FAMILIES[name].hidden, *FAMILIES[name].head_dim, "n_layer"}
] + [("falcon", "n_embed", "hidden_size"), ("bloom", "n_embed", "hidden_size")]


@pytest.mark.parametrize(("name", "alias", "key"), ALIASES)
def test_aliases_mean_what_transformers_makes_of_them(name: str, alias: str, key: str, saved: Saved) -> None:
    """Under either name the figures are the class's; under both with two values, which count would be a guess."""
    config = config_of(saved(name))
    figures = [(x.num_attention_heads, x.head_dim) for x in detect(config).layers]
    renamed = {k: v for k, v in config.items() if k != key} | {alias: config[key]}
    assert [(x.num_attention_heads, x.head_dim) for x in detect(renamed).layers] == figures
    assert getattr(transformers.CONFIG_MAPPING[name].from_dict(renamed), key) == config[key]
    detect(config | {alias: config[key]})
    with pytest.raises(RegroupError, match=f"mean the same and differ(.|\n)*{key}"):
        detect(config | {alias: 2 * config[key]})


def test_keys_of_older_code_that_transformers_does_not_read(saved: Saved) -> None:
    config = {k: v for k, v in config_of(saved("stablelm")).items() if k not in ("rope_parameters",)}
    with pytest.raises(RegroupError, match=r"rename rope_pct to partial_rotary_factor"):
        detect({**config, "rope_pct": 0.5})
    detect({**config, "rope_pct": 0.5, "partial_rotary_factor": 0.5})
    with pytest.raises(RegroupError, match="mean the same"):
        detect({**config, "rope_pct": 0.5, "partial_rotary_factor": 0.25})


@pytest.mark.parametrize("name", tiny.FAMILIES)
def test_present_configs_are_left_as_they_are(name: str, saved: Saved) -> None:
    config = config_of(saved(name))
    assert as_known(config) is config
