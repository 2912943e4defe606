"""Grouped classes against their stock original models, for every family, and their way to disk and back."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

import naive
import tiny
from regroup import modeling as models
from regroup.errors import RegroupError
from regroup.modeling import modeling_regroup
from regroup.modeling.expected import model_class

FAMILIES = list(tiny.FAMILIES)
EAGER_ONLY = {"gemma2", "gemma2_grouped", "bloom"}
# Stock Falcon adds ALiBi to the mask and, when eager, to the scores as well.
STOCK_EAGER_DIFFERS = {"falcon_alibi"}


def divisors(name: str) -> list[int]:
    heads = tiny.FAMILIES[name].num_key_value_heads
    return [groups for groups in range(heads, 0, -1) if heads % groups == 0]


def head_map(name: str, kind: str) -> dict[str, int]:
    """The number of KV heads of each attention module: all of them, some, one, or another one in each module."""
    modules, choices = tiny.FAMILIES[name].attention_modules, divisors(name)
    if kind == "mixed":
        return {path: choices[(i + 1) % len(choices)] for i, path in enumerate(modules)}
    groups = {"all": choices[0], "some": choices[len(choices) // 2], "one": 1}[kind]
    return dict.fromkeys(modules, groups)


def grouped(
    original: PreTrainedModel,
    heads: dict[str, int],
    *,
    rule: naive.Rule = "mean",
    attn_implementation: str | None = None,
) -> PreTrainedModel:
    """The grouped class with the original model's weights, grouped by the naive route."""
    stock = original.config.to_dict() | {"architectures": [type(original).__name__]}
    raw = models.grouped_config(stock, heads)
    config = type(original.config).from_dict(raw)
    config._attn_implementation = attn_implementation
    model = getattr(modeling_regroup, raw["architectures"][0])(config)
    head: Any = model.get_output_embeddings()
    original_head: Any = original.get_output_embeddings()
    if original_head.weight is not original.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    model.load_state_dict(naive.group_state_dict(original, heads, rule))
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel, arguments: dict[str, Any]) -> Tensor:
    return model(**arguments).logits


def assert_same(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["all", "some", "one", "mixed"])
@pytest.mark.parametrize("name", FAMILIES)
def test_original_with_equal_heads_in_each_group_loses_nothing(name: str, kind: str) -> None:
    heads, arguments = head_map(name, kind), tiny.inputs(name, 2, 9)
    original = tiny.build(name)
    untied = logits(original, arguments)
    if kind != "all":
        assert (logits(grouped(original, heads), arguments) - untied).abs().max() > 1e-3
    naive.tie_groups(original, heads)
    expected = logits(original, arguments)
    for rule in ("mean", "first"):
        assert_same(logits(grouped(original, heads, rule=rule), arguments), expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_eager_and_sdpa_agree(name: str) -> None:
    heads, arguments = head_map(name, "mixed"), tiny.inputs(name, 2, 9)
    original = tiny.build(name, attn_implementation="eager")
    naive.tie_groups(original, heads)
    eager = logits(grouped(original, heads, attn_implementation="eager"), arguments)
    assert_same(eager, logits(original, arguments))
    if name not in EAGER_ONLY | STOCK_EAGER_DIFFERS:
        assert_same(logits(grouped(original, heads, attn_implementation="sdpa"), arguments), eager)


def cached_heads(cache: Any, name: str) -> dict[str, int]:
    """The number of heads that the cache really holds for each attention module."""
    parts = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "is_updated") else [cache]
    family = tiny.FAMILIES[name]
    return {
        path.format(i): part.layers[i].keys.shape[1]
        for i in range(family.num_hidden_layers)
        for path, part in zip(family.attention_paths, parts, strict=True)
    }


@torch.no_grad()
def step_by_step(model: PreTrainedModel, name: str, arguments: dict[str, Tensor]) -> tuple[Tensor, Any]:
    """Logits of a forward pass for each token, with a cache; and the cache."""
    seq2seq = tiny.FAMILIES[name].kind != "causal"
    ids = arguments["decoder_input_ids" if seq2seq else "input_ids"]
    static: dict[str, Any] = {"use_cache": True}
    if seq2seq:
        first = next(iter(arguments))
        mask = {key: value for key, value in arguments.items() if key == "attention_mask"}
        states = model.get_encoder()(arguments[first], **mask).last_hidden_state
        static |= {"encoder_outputs": BaseModelOutput(last_hidden_state=states), **mask}
        cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache())
    else:
        cache = DynamicCache(config=model.config)
    parts = []
    for t in range(ids.shape[1]):
        token = {"decoder_input_ids" if seq2seq else "input_ids": ids[:, t : t + 1]}
        if not seq2seq:
            token["attention_mask"] = arguments["attention_mask"][:, : t + 1]
        parts.append(model(**token, **static, past_key_values=cache).logits)
    return torch.cat(parts, dim=1), cache


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_cache_holds_the_grouped_heads_and_changes_no_logits(name: str, attn_implementation: str) -> None:
    if attn_implementation == "sdpa" and name in EAGER_ONLY:
        pytest.skip("the stock class has no sdpa")
    heads, arguments = head_map(name, "mixed"), tiny.inputs(name, 2, 9)
    model = grouped(tiny.build(name), heads, attn_implementation=attn_implementation)
    stepwise, cache = step_by_step(model, name, arguments)
    assert_same(stepwise, logits(model, arguments), 1e-4)
    assert cached_heads(cache, name) == heads


def pad(ids: Tensor, count: int, side: str) -> tuple[Tensor, Tensor]:
    """Move the first ``count`` tokens of row 1 out of the row, padding on one side; and the mask."""
    short, padding = ids[1, count:], ids.new_zeros(count)
    row = torch.cat([padding, short] if side == "left" else [short, padding])
    padded = torch.stack([ids[0], row])
    mask = torch.ones_like(padded)
    mask[1, :count] = 0 if side == "left" else 1
    if side == "right":
        mask[1, -count:] = 0
    return padded, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if tiny.FAMILIES[n].kind == "causal"])
def test_padded_batch_equals_single_rows(name: str, side: str) -> None:
    model = grouped(tiny.build(name), head_map(name, "mixed"))
    ids, count = tiny.inputs(name, 2, 9)["input_ids"], 3
    padded, mask = pad(ids, count, side)
    arguments = {"input_ids": padded, "attention_mask": mask}
    if name.startswith("gpt") and "neox" not in name:  # the others see relative positions, or count from the mask
        arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    together = logits(model, arguments)
    real = together[1, count:] if side == "left" else together[1, :-count]
    assert_same(together[0], logits(model, {"input_ids": ids[:1]})[0], 1e-4)
    assert_same(real, logits(model, {"input_ids": ids[1:, count:]})[0], 1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", [n for n in FAMILIES if tiny.FAMILIES[n].kind == "seq2seq"])
def test_padded_source_equals_single_rows(name: str, side: str) -> None:
    if side == "left" and "t5" not in name:
        pytest.skip("absolute positions: the stock class shifts them with the padding")
    model = grouped(tiny.build(name), head_map(name, "mixed"))
    arguments, count = tiny.inputs(name, 2, 9), 3
    ids, decoder_ids = arguments["input_ids"], arguments["decoder_input_ids"]
    padded, mask = pad(ids, count, side)
    together = logits(model, {"input_ids": padded, "attention_mask": mask, "decoder_input_ids": decoder_ids})
    assert_same(together[0], logits(model, {"input_ids": ids[:1], "decoder_input_ids": decoder_ids[:1]})[0], 1e-4)
    alone = logits(model, {"input_ids": ids[1:, count:], "decoder_input_ids": decoder_ids[1:]})
    assert_same(together[1], alone[0], 1e-4)


def generate(model: PreTrainedModel, arguments: dict[str, Tensor], **kwargs: Any) -> Tensor:
    given = {key: value for key, value in arguments.items() if key != "decoder_input_ids"}
    return model.generate(**given, max_new_tokens=6, min_new_tokens=6, do_sample=False, **kwargs)  # type: ignore[operator]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_generation_equals_the_tied_original(name: str) -> None:
    heads, arguments = head_map(name, "mixed"), tiny.inputs(name, 2, 5)
    original = tiny.build(name)
    naive.tie_groups(original, heads)
    assert torch.equal(generate(grouped(original, heads), arguments), generate(original, arguments))


@pytest.mark.parametrize("name", ["llama", "t5", "bart", "whisper", "falcon_alibi", "gpt2"])
def test_beam_search_equals_the_tied_original(name: str) -> None:
    heads, arguments = head_map(name, "mixed"), tiny.inputs(name, 2, 5)
    original = tiny.build(name)
    naive.tie_groups(original, heads)
    expected = generate(original, arguments, num_beams=3)
    assert torch.equal(generate(grouped(original, heads), arguments, num_beams=3), expected)


@pytest.mark.parametrize("name", ["t5", "umt5", "bart", "whisper", "opt", "gpt_neox", "bloom", "falcon"])
def test_attention_weights_have_query_heads(name: str) -> None:
    family = tiny.FAMILIES[name]
    model = grouped(tiny.build(name), head_map(name, "one"), attn_implementation="eager")
    with torch.no_grad():
        output = model(**tiny.inputs(name, 2, 5), output_attentions=True)
    kinds = [output.attentions] if family.kind == "causal" else [output.decoder_attentions, output.cross_attentions]
    for attentions in kinds:
        assert [a.shape[1] for a in attentions] == [family.num_attention_heads] * family.num_hidden_layers


@pytest.mark.parametrize("name", FAMILIES)
def test_saved_and_loaded_is_the_same_model(name: str, tmp_path: Path) -> None:
    arguments = tiny.inputs(name, 2, 5)
    model = grouped(tiny.build(name), head_map(name, "mixed"))
    model.save_pretrained(tmp_path)
    again = models.load(tmp_path)
    assert type(again) is type(model)
    stored, kept = again.state_dict(), model.state_dict()
    assert stored.keys() == kept.keys()
    assert all(torch.equal(stored[key], kept[key]) for key in kept)
    # How weights lie in memory decides which kernel multiplies experts, on some processors.
    torch.testing.assert_close(logits(again, arguments), logits(model, arguments), rtol=1e-5, atol=1e-5)
    assert (tmp_path / "modeling_regroup.py").read_bytes() == models.MODELING_FILE.read_bytes()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    assert f"modeling_regroup.{type(model).__name__}" in config["auto_map"].values()
    assert config["auto_map"]["AutoModel"].startswith("modeling_regroup.Regroup")


def test_load_takes_stock_checkpoints(tmp_path: Path) -> None:
    tiny.save("qwen2", tmp_path)
    assert type(models.load(tmp_path)).__name__ == "Qwen2ForCausalLM"
    assert models.load(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "head"), [("llama", "ForSequenceClassification"), ("t5", "Model"), ("gpt2", "Model")])
def test_other_heads_of_a_family(name: str, head: str, tmp_path: Path) -> None:
    model = grouped(tiny.build(name), head_map(name, "mixed"))
    model.config.num_labels = 3
    stem = tiny.FAMILIES[name].config_class.removesuffix("Config")
    other = getattr(modeling_regroup, f"Regroup{stem}{head}")(model.config).eval()
    arguments = tiny.inputs(name, 2, 5) | ({"attention_mask": None} if name == "llama" else {})
    other.config.pad_token_id = None if name != "llama" else 0
    other.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(models.load(tmp_path)(**arguments)[0], other(**arguments)[0])


REMOTE = """
import sys
sys.modules["regroup"] = None  # importing it fails
import torch, transformers
root, arguments = sys.argv[1], torch.load(sys.argv[1] + "/arguments.pt")
for auto, name in (word.split(":") for word in sys.argv[2:]):
    model = getattr(transformers, auto).from_pretrained(f"{root}/{name}", trust_remote_code=True)
    with torch.no_grad():
        torch.save(model(**arguments[name]).logits, f"{root}/{name}.pt")
    transformers.AutoModel.from_pretrained(f"{root}/{name}", trust_remote_code=True)
    model.save_pretrained(f"{root}/{name}-again")
"""


@pytest.mark.slow
def test_remote_code_loads_without_regroup(tmp_path: Path) -> None:
    autos = {
        "llama": "AutoModelForCausalLM",
        "t5": "AutoModelForSeq2SeqLM",
        "whisper": "AutoModelForSpeechSeq2Seq",
        "falcon": "AutoModelForCausalLM",
        "gpt2": "AutoModelForCausalLM",
    }
    arguments = {name: tiny.inputs(name, 2, 5) for name in autos}
    torch.save(arguments, tmp_path / "arguments.pt")
    expected, auto_maps = {}, {}
    for name in autos:
        model = grouped(tiny.build(name), head_map(name, "mixed"))
        model.save_pretrained(tmp_path / name)
        expected[name] = logits(model, arguments[name])
        auto_maps[name] = json.loads((tmp_path / name / "config.json").read_text())["auto_map"]
    environment = {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HOME": str(tmp_path / "home"),
    }
    subprocess.run(
        [sys.executable, "-c", REMOTE, str(tmp_path), *(f"{auto}:{name}" for name, auto in autos.items())],
        env=environment,
        check=True,
        timeout=300,
    )
    for name in autos:
        assert torch.equal(torch.load(tmp_path / f"{name}.pt"), expected[name])
        again = tmp_path / f"{name}-again"
        assert torch.equal(logits(models.load(again), arguments[name]), expected[name])
        assert json.loads((again / "config.json").read_text())["auto_map"] == auto_maps[name]


def config_with(record: Any) -> Any:
    config = tiny.build("llama").config
    config.regroup = record
    return config


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (None, "should be"),
        ({"format": 1}, "should be"),
        ({"format": 2, "num_key_value_heads": {}}, "format 2, expected 1"),
        (
            {"format": 1, "num_key_value_heads": {"layers.9.self_attn": 2}},
            r"layers\.9\.self_attn.*layers\.0\.self_attn",
        ),
        ({"format": 1, "num_key_value_heads": {"layers.0.mlp": 2}}, "expected an attention module.*LlamaMLP"),
        ({"format": 1, "num_key_value_heads": {"layers.0.self_attn": 4}}, r"6 query heads, got 4.*\[1, 2, 3, 6\]"),
        ({"format": 1, "num_key_value_heads": {"layers.0.self_attn": 0}}, "got 0"),
        ({"format": 1, "num_key_value_heads": {"layers.0.self_attn": "2"}}, "got '2'"),
    ],
)
def test_bad_maps_are_refused(record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"RegroupLlamaForCausalLM.*{message}"):
        modeling_regroup.RegroupLlamaForCausalLM(config_with(record))


def test_map_larger_than_the_configuration_is_refused() -> None:
    config = tiny.build("llama_grouped").config
    config.regroup = {"format": 1, "num_key_value_heads": {"layers.0.self_attn": 12}}
    with pytest.raises(ValueError, match=r"at most the 6 key/value heads.*got 12.*num_key_value_heads in config\.json"):
        modeling_regroup.RegroupLlamaForCausalLM(config)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="RegroupNoSuchModel"):
        _ = modeling_regroup.RegroupNoSuchModel
    with pytest.raises(RegroupError, match=r"a config\.json in it"):
        models.load(tmp_path)
    with pytest.raises(RegroupError, match=r"(?s)not a model class.*AutoConfig"):
        model_class({"model_type": "llama", "architectures": ["AutoConfig"]}, "config.json")
    with pytest.raises(RegroupError, match="no Auto class"):
        models.grouped_config({"model_type": "llama", "architectures": ["T5Model"]}, {})
    with pytest.raises(RegroupError, match="does not name the model's class"):
        models.grouped_config({"model_type": "llama"}, {})


def test_grouped_config_of_a_grouped_config_changes_the_map_only() -> None:
    stock = tiny.build("llama").config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "auto_map": {"AutoModel": "x.Y"},
    }
    before = copy.deepcopy(stock)
    first = models.grouped_config(stock, {"layers.0.self_attn": 3, "layers.1.self_attn": 2})
    second = models.grouped_config(first, {"layers.0.self_attn": 3, "layers.1.self_attn": 1})
    assert stock == before
    assert first["num_key_value_heads"] == 3
    assert first["auto_map"]["AutoModel"] == "modeling_regroup.RegroupLlamaModel"
    assert first["auto_map"]["AutoModelForCausalLM"] == "modeling_regroup.RegroupLlamaForCausalLM"
    assert {key for key in first if first[key] != second[key]} == {"regroup"}


@pytest.mark.parametrize("name", FAMILIES)
def test_random_initialisation_and_meta_device(name: str) -> None:
    config = grouped(tiny.build(name), head_map(name, "one")).config
    cls = getattr(
        modeling_regroup,
        models.grouped_config(
            config.to_dict() | {"architectures": [tiny.FAMILIES[name].model_class]}, head_map(name, "one")
        )["architectures"][0],
    )
    model = cls(config)
    stock = getattr(__import__("transformers"), tiny.FAMILIES[name].model_class)(copy.deepcopy(config))
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in cls(copy.deepcopy(config)).state_dict().items()}
    assert shapes == {key: value.shape for key, value in model.state_dict().items()}
    spread = {key: value.float().std() for key, value in stock.state_dict().items() if value.ndim == 2}
    for key, value in model.state_dict().items():
        assert value.isfinite().all()
        if key in spread and value.numel() > 100 and spread[key] > 0:
            assert 0.7 < value.float().std() / spread[key] < 1.4, key


def test_gradients_and_copies() -> None:
    for name in ("t5", "whisper", "falcon", "gpt2", "gpt_neox"):
        model = copy.deepcopy(grouped(tiny.build(name), head_map(name, "mixed"))).train()
        arguments = tiny.inputs(name, 2, 5)
        ids = arguments.get("decoder_input_ids", arguments.get("input_ids"))
        model(**arguments, labels=ids).loss.backward()
        parameters = {key: p for key, p in model.named_parameters() if p.requires_grad and "attn" in key.lower()}
        assert all(p.grad is not None for p in parameters.values())


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, regroup.modeling; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
