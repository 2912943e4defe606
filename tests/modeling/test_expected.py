"""Incomplete, altered and unbuildable checkpoints are refused by name, whoever loads the weights."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import regroup
import runs
import tiny
from helpers import INDEX, config_of, copy, edit_json, everything, logits, refused, run, scattered, tensors, write
from regroup import RegroupError
from regroup.bench.build import describe
from regroup.modeling.expected import check_generation_config, check_loadable

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]

UP = "model.layers.0.mlp.up_proj.weight"


@dataclass(frozen=True)
class Entry:
    dtype: str
    shape: tuple[int, ...]


Entries = dict[str, Entry]


def entries(folder: Path) -> Entries:
    """What the headers say, read by the safetensors library."""
    return {name: Entry("F32", tuple(value.shape)) for name, value in tensors(folder).items()}


def drop(found: Entries, name: str) -> Entries:
    return {key: entry for key, entry in found.items() if key != name}


def rename(found: Entries, name: str) -> Entries:
    return {**drop(found, name), f"{name}.old": found[name]}


def renumber(found: Entries, name: str) -> Entries:
    """Another layer, or another expert of it."""
    return {**drop(found, name), re.sub(r"\d+(?=\D*$)", "97", name): found[name]}


def reshape(found: Entries, name: str) -> Entries:
    shape = found[name].shape
    return {**found, name: Entry("F32", (shape[0] + 1, *shape[1:]))}


def quantise(found: Entries, name: str) -> Entries:
    return {**found, name: Entry("I8", found[name].shape)}


CHANGES = (drop, rename, renumber, reshape, quantise)


def one_of_a_kind(found: Mapping[str, Entry]) -> list[str]:
    """The last of the tensors that differ in numbers alone: the last expert, the last layer."""
    return list({re.sub(r"\d+", "#", name): name for name in found}.values())


def left_to_config(name: str, family: str) -> bool:
    """A head that the config says is tied, of a tiny checkpoint that stores it all the same."""
    return tiny.FAMILIES[family].untied_head and name in ("lm_head.weight", "shared.weight")


def changed(folder: Path, family: str, kinds: int | None) -> Iterator[tuple[str, str, Entries]]:
    """Changes to kinds of tensors, in turn where only some of the kinds are wanted."""
    found = entries(folder)
    names = [name for name in one_of_a_kind(found) if "final_logits_bias" not in name]
    step = 1 if kinds is None else max(1, len(names) // kinds)
    for number, name in enumerate(names[::step]):
        for place, change in enumerate(CHANGES):
            if kinds is not None and place != (number + len(family)) % len(CHANGES):
                continue
            if change is renumber and not re.search(r"\d", name):
                continue
            if change in (drop, rename) and left_to_config(name, family):
                continue
            if change is drop and family == "pegasus" and "embed_positions" in name:
                continue  # computed: see below
            yield change.__name__, name, change(found, name)


def refuse_all(folder: Path, family: str, kinds: int | None) -> None:
    config = config_of(folder)
    check_loadable(config, entries(folder), folder)  # the control: as it is, it is accepted
    for how, name, altered in changed(folder, family, kinds):
        with pytest.raises(RegroupError) as caught:
            check_loadable(config, altered, folder)
        assert name in str(caught.value), f"{how} of {name}: {caught.value}"


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_changed_tensor_is_refused_by_its_name(family: str, saved: Saved) -> None:
    refuse_all(saved(family), family, 4)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_changed_tensor_is_refused_by_its_name(family: str, saved: Saved) -> None:
    refuse_all(saved(family), family, None)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2", "t5", "stablelm_norm"])
def test_a_changed_tensor_of_a_converted_model_is_refused(family: str, converted: Converted) -> None:
    refuse_all(converted(family, "mixed"), family, 4)


def test_what_is_refused_would_be_random(saved: Saved, tmp_path: Path) -> None:
    """The reason for all this: transformers fills in what is missing, and goes on."""
    state = tensors(saved("llama"))
    del state[UP]
    folder = write(tmp_path / "gap", config_of(saved("llama")), state)
    transformers.logging.set_verbosity_error()
    first, second = (transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()[UP] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["bart", "marian"])
def test_a_buffer_with_a_default_may_be_missing_and_is_named(
    family: str, saved: Saved, caplog: pytest.LogCaptureFixture
) -> None:
    folder = saved(family)
    check_loadable(config_of(folder), entries(folder), folder)
    assert not caplog.records
    check_loadable(config_of(folder), drop(entries(folder), "final_logits_bias"), folder)
    assert "final_logits_bias" in caplog.text


@pytest.mark.parametrize("name", ["pegasus", "marian"])
def test_tables_of_positions_may_be_missing_for_they_are_computed(
    name: str, saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Pegasus was published without them. The oracle is transformers' model with the tables of its own state."""
    whole = tiny.build(name)
    state = {key: value for key, value in tensors(saved(name)).items() if "embed_positions" not in key}
    folder = write(tmp_path / "in", config_of(saved(name)), state)
    check_loadable(config_of(folder), entries(folder), folder)
    assert ("computes" in caplog.text) == (name == "pegasus")  # Marian never stores them
    assert run("convert", folder, tmp_path / "out", "--kv-heads", 6, "--method", "mean")[0] == 0
    made: Any = type(whole).from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(made, name), logits(whole, name))
    trained = "model.encoder.layers.0.fc1.weight"
    with pytest.raises(RegroupError, match=re.escape(trained)):
        check_loadable(config_of(folder), drop(entries(folder), trained), folder)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_kernel_that_is_not_installed_is_no_reason_to_refuse(
    key: str, saved: Saved, tmp_path: Path
) -> None:
    from transformers.utils.import_utils import is_flash_attn_3_available

    if is_flash_attn_3_available():
        pytest.skip("FlashAttention 3 is installed")
    folder = copy(saved("llama"), tmp_path / "in")
    edit_json(folder / "config.json", **{key: "flash_attention_3"})
    with pytest.raises(ImportError):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert run("convert", folder, tmp_path / "out", "--kv-heads", 2, "--method", "mean")[0] == 0
    assert config_of(tmp_path / "out")[key] == "flash_attention_3"  # for the machine that has it
    plain = transformers.AutoModelForCausalLM.from_pretrained(saved("llama")).eval()
    loaded: Any = regroup.load(folder, progress=False)
    assert torch.equal(logits(loaded.eval(), "llama"), logits(plain, "llama"))
    edit_json(folder / "config.json", **{key: "flash_attention_99"})
    with pytest.raises(RegroupError, match="flash_attention_99"):
        regroup.load(folder, progress=False)


def test_what_calls_return_by_default_does_not_matter(gap: Path, tmp_path: Path) -> None:
    folder, out = copy(gap / "child", tmp_path / "in"), tmp_path / "out"
    said = {"return_dict": False, "output_attentions": True, "output_hidden_states": True}
    edit_json(folder / "config.json", **said)
    text = ("--data", gap / "held-out.txt", "--window", 16)
    for asked in (["evaluate", folder, *text], ["uptrain", folder, *text, "--steps", 1, "-o", out]):
        status, _, errors = run(*asked)
        assert status == 0, errors
    assert said.items() <= config_of(out / "model").items()  # they are kept


@pytest.mark.parametrize(
    ("family", "old"),
    [("t5", "T5WithLMHeadModel"), ("llama", "LLaMAForCausalLM"), ("gpt_bigcode", "GPTBigCodeLMHeadModel")],
)
def test_a_class_by_an_older_name_is_known(family: str, old: str, saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved(family), tmp_path / "in")
    now = config_of(folder)["architectures"]
    edit_json(folder / "config.json", architectures=[old])
    stock: Any = getattr(transformers, now[0])
    for heads, loader in ((6, stock.from_pretrained), (3, regroup.load)):
        out = tmp_path / str(heads)
        assert run("convert", folder, out, "--kv-heads", heads, "--method", "mean")[0] == 0
        assert config_of(out)["architectures"][0].removeprefix("Regroup") == now[0]
        assert torch.equal(
            logits(loader(out).eval(), family), logits(stock.from_pretrained(folder).eval(), family)
        ) == (heads == 6)
    assert describe(config_of(folder), kv_heads=None, layers=None, folder=folder).folder == folder  # what bench builds
    edit_json(folder / "config.json", architectures=[f"{old}s"])
    assert f"{old}s" in refused("convert", folder, tmp_path / "no", "--kv-heads", 6, "--method", "mean")


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "mt5"])
def test_the_table_in_t5_cross_attention_that_no_class_reads_is_kept(family: str, saved: Saved, tmp_path: Path) -> None:
    """Every T5 of Google's has one."""
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    state = {**tensors(saved(family)), name: torch.randn(8, 6)}
    folder = write(tmp_path / "in", config_of(saved(family)), state)
    assert run("convert", folder, tmp_path / "6", "--kv-heads", 6, "--method", "mean")[0] == 0
    stock: Any = getattr(transformers, tiny.FAMILIES[family].model_class)
    assert torch.equal(logits(stock.from_pretrained(tmp_path / "6").eval(), family), logits(tiny.build(family), family))
    assert torch.equal(tensors(tmp_path / "6")[name], state[name])
    assert run("convert", folder, tmp_path / "2", "--kv-heads", 2, "--method", "mean")[0] == 0
    assert run("verify", folder, tmp_path / "2")[0] == 0
    regroup.load(tmp_path / "2", progress=False)
    other = name.replace("block.0", "block.1")
    write(folder, config_of(folder), {**state, other: torch.randn(8, 6)})
    assert other in refused("convert", folder, tmp_path / "no", "--kv-heads", 6, "--method", "mean")


@pytest.mark.parametrize(
    ("family", "legacy"),
    [
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.0.attn.masked_bias"),
        ("gpt_neox", "gpt_neox.layers.0.attention.masked_bias"),
        ("gpt_bigcode", "transformer.h.0.attn.bias"),
        ("bart", "model.encoder.version"),
        ("m2m_100", "model.encoder.embed_positions.weights"),
    ],
)
def test_other_tensors_of_old_files_are_accepted(family: str, legacy: str, saved: Saved) -> None:
    folder = saved(family)
    check_loadable(config_of(folder), {**entries(folder), legacy: Entry("F32", (1,))}, folder)


def test_names_without_the_prefix_are_accepted_and_both_together_are_not(saved: Saved) -> None:
    folder, found = saved("gpt2"), entries(saved("gpt2"))
    bare = {name.removeprefix("transformer."): entry for name, entry in found.items()}
    check_loadable(config_of(folder), bare, folder)
    with pytest.raises(RegroupError, match=r"(?s)twice.*h\.0\.ln_1\.weight"):
        check_loadable(config_of(folder), {**found, "h.0.ln_1.weight": found["transformer.h.0.ln_1.weight"]}, folder)


def test_a_base_model_is_complete_without_a_head_if_its_config_says_so(saved: Saved) -> None:
    folder, found = saved("llama"), entries(saved("llama"))
    bare = {name.removeprefix("model."): entry for name, entry in drop(found, "lm_head.weight").items()}
    check_loadable(config_of(folder) | {"architectures": ["LlamaModel"]}, bare, folder)
    with pytest.raises(RegroupError, match=r"lm_head\.weight"):
        check_loadable(config_of(folder), bare, folder)
    with pytest.raises(RegroupError, match=r"lm_head\.weight"):
        check_loadable(config_of(folder) | {"architectures": ["LlamaModel"]}, found, folder)


# Values that transformers refuses when it builds the model, of every kind of key.
UNBUILDABLE: list[dict[str, Any]] = [
    {"vocab_size": -1},
    {"hidden_act": "os.system"},
    {"layer_types": ["full_attention"]},
    {"rope_parameters": "x"},
    {"rope_parameters": {"rope_type": "yarn"}},
    {"dtype": "float999"},
    {"rms_norm_eps": "nan"},
    {"max_position_embeddings": "many"},
    {"pad_token_id": 99_999},
    {"tie_word_embeddings": "maybe"},
    {"id2label": {"x": 1}},
    {"architectures": ["LlamaForPoetry"]},
    {"architectures": ["MistralForCausalLM"]},
    {"attn_implementation": "nothing"},
    {"attn_implementation": "someone/kernels"},
    {"mlp_bias": True},
]


@pytest.mark.parametrize("change", UNBUILDABLE, ids=json.dumps)
def test_a_config_that_does_not_load_is_not_converted(change: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    edit_json(folder / "config.json", **change)
    before = everything(tmp_path)
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 2, "--method", "mean")
    assert "config.json" in message or "mlp" in message
    assert everything(tmp_path) == before


def test_the_configs_that_are_refused_differ_in_that_key_alone(saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    edit_json(folder / "config.json", rms_norm_eps=1e-5, architectures=None)
    status, output, errors = run("convert", folder, tmp_path / "out", "--kv-heads", 2, "--method", "mean")
    assert (status, "stock transformers" in " ".join((output + errors).split())) == (0, True)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, report = loaded
    assert model.config.num_key_value_heads == 2
    assert not any(report.values())


@pytest.mark.parametrize("text", ["[]", '{"cache_implementation": "nothing"}', "no JSON", '{"a":' * 9000])
def test_settings_for_generation_that_do_not_load_are_refused(text: str, saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    check_generation_config(folder)
    (folder / "generation_config.json").write_text(text)
    message = refused("convert", folder, tmp_path / "out", "--kv-heads", 2, "--method", "mean")
    assert "generation_config.json" in message


@pytest.fixture(scope="module")
def gap(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An original and a converted model, whole and with a feed-forward tensor less, and text."""
    folder = tmp_path_factory.mktemp("gap")
    original, result = runs.pair(folder)
    runs.text(folder)
    for whole in (original, result):
        broken = copy(whole, whole.with_name(f"{whole.name}-gap"))
        state = tensors(whole)
        del state[UP]
        write(broken, config_of(whole), state)
        sharded = copy(broken, whole.with_name(f"{whole.name}-gap-sharded"))
        (sharded / "model.safetensors").unlink()
        write(sharded, config_of(whole), state, shards=scattered(sorted(state)))
        pickled = copy(broken, whole.with_name(f"{whole.name}-gap-pickled"))
        (pickled / "model.safetensors").unlink()
        torch.save(state, pickled / "pytorch_model.bin")
    return folder


def commands(folder: Path, original: str, result: str, out: Path) -> dict[str, list[object]]:
    text = folder / "held-out.txt"
    calibration = ("--calibration", text, "--calibration-window", 16, "--calibration-tokens", 256)
    return {
        "convert": ["convert", folder / original, out, "--kv-heads", 2, "--method", "mean"],
        "dry run": ["convert", folder / original, out, "--kv-heads", 2, "--method", "mean", "--dry-run"],
        "calibrate": ["convert", folder / original, out, "--kv-heads", 2, *calibration],
        "plan": ["plan", folder / original, "-o", out, "--kv-budget", "50%", *calibration],
        "evaluate": ["evaluate", folder / original, "--data", text, "--window", 16],
        "teacher": ["evaluate", folder / "child", "--teacher", folder / original, "--data", text, "--window", 16],
        "verify": ["verify", folder / original, folder / "child"],
        "export": ["export", folder / result, out, "--to", "hf", "--no-check"],
        "gguf": ["export", folder / result, out.with_suffix(".gguf"), "--to", "gguf", "--no-check"],
        "uptrain": ["uptrain", folder / result, "--data", text, "--steps", 1, "--window", 16, "-o", out],
        "bench": ["bench", "decode", folder / original, "--kv-heads", 6, "--prompt", 4, "--new", 2, "--batch", 1],
    }


@pytest.mark.parametrize("command", commands(Path(), "", "", Path("x")))
@pytest.mark.parametrize("form", ["gap", "gap-sharded"])
def test_no_command_takes_a_checkpoint_that_lacks_a_tensor(command: str, form: str, gap: Path, tmp_path: Path) -> None:
    asked = commands(gap, f"parent-{form}", f"child-{form}", tmp_path / "out")[command]
    before = everything(gap)
    assert UP in refused(*asked)
    assert not everything(tmp_path)
    assert everything(gap) == before


@pytest.mark.parametrize("change", UNBUILDABLE, ids=json.dumps)
def test_a_config_that_does_not_load_is_not_timed(change: dict[str, Any], saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    edit_json(folder / "config.json", **change)
    refused("bench", "decode", folder, "--prompt", 4, "--new", 2, "--batch", 1)


@pytest.mark.parametrize("command", ["evaluate", "teacher", "verify", "gguf"])
def test_every_command_takes_the_whole_checkpoint(command: str, gap: Path, tmp_path: Path) -> None:
    status, _, errors = run(*commands(gap, "parent", "child", tmp_path / "out")[command])
    assert status == 0, errors


def test_a_pickle_that_lacks_a_tensor_is_refused(gap: Path, tmp_path: Path) -> None:
    asked = commands(gap, "parent-gap-pickled", "child", tmp_path / "out")["convert"]
    assert UP in refused(*asked, "--allow-pickle")
    assert not everything(tmp_path)


def test_verify_tells_a_converted_model_that_lacks_a_tensor(gap: Path) -> None:
    status, output, _ = run("verify", gap / "parent", gap / "child-gap")
    assert status == 1
    assert f"✗ transformers finds every weight: the checkpoint lacks a tensor that the model needs; file: {gap}"[
        :60
    ] in (" ".join(output.split()))


def test_two_sets_of_weights_in_one_folder_are_refused(saved: Saved, tmp_path: Path) -> None:
    """transformers reads the single file, others the index."""
    folder = copy(saved("llama"), tmp_path / "in")
    state = tensors(folder)
    write(folder, config_of(folder), state, shards=scattered(sorted(state)))
    assert "two sets of weights" in refused("inspect", folder)
    (folder / "model.safetensors").unlink()
    assert run("inspect", folder)[0] == 0
    assert (folder / INDEX).exists()


def test_a_weights_file_that_the_config_names_is_refused(saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    assert "other.safetensors" in refused("inspect", folder)
