"""What the converter writes beside merged heads: dtypes, shards, index, companions, the card; and that it repeats."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import naive
import regroup
import tiny
from helpers import (
    INDEX,
    assert_same_tensors,
    carried_out,
    config_of,
    convert_heads,
    copy,
    digests,
    head_map,
    layout_of,
    metadata,
    plan_for,
    refused,
    run,
    scattered,
    steps_apart,
    tensors,
    write,
)
from regroup import RegroupError
from regroup.checkpoint import open_checkpoint
from regroup.conversion.convert import carry_out
from regroup.listener import Listener
from regroup.opening import Source
from regroup.plans import Plan, make_plan
from regroup.writer.preview import prepare, preview

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
# Separate with norms a head, stacked and transposed, interleaved, encoder-decoder.
PACKINGS = ["stablelm_norm", "gpt2", "gpt_neox", "bart"]

Saved = Callable[[str], Path]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKINGS)
def test_dtypes_are_kept(name: str, dtype: str, tmp_path: Path) -> None:
    parent, heads = tiny.build(name, dtype=DTYPES[dtype]), head_map(name, "some")
    parent.save_pretrained(tmp_path / "parent")
    convert_heads(tmp_path / "parent", tmp_path / "child", heads)
    child, before = tensors(tmp_path / "child"), parent.state_dict()
    after = naive.group_state_dict(parent, heads)
    merged = {k for k, v in after.items() if v.shape != before[k].shape or not torch.equal(v, before[k])}
    assert merged
    for key, tensor in child.items():
        assert tensor.dtype == DTYPES[dtype], key
        # 16-bit heads are added in float32 here and in float64 there, and float64 in another order.
        limit = 0 if key not in merged or dtype == "F32" else (1 if dtype != "F64" else 2**20)
        if key in after:
            assert steps_apart(tensor, after[key]) <= limit, key
    assert config_of(tmp_path / "child")["dtype"] == config_of(tmp_path / "parent")["dtype"]
    first = naive.group_state_dict(parent, heads, "first")
    assert any(steps_apart(child[key], first[key]) > (2**30 if dtype == "F64" else 9) for key in merged)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", PACKINGS)
def test_the_mean_of_equal_heads_is_exact(name: str, dtype: str, tmp_path: Path) -> None:
    parent, heads = tiny.build(name, dtype=DTYPES[dtype]), head_map(name, "some")
    different = naive.group_state_dict(parent, heads, "first")
    naive.tie_groups(parent, heads)
    parent.save_pretrained(tmp_path / "parent")
    convert_heads(tmp_path / "parent", tmp_path / "child", heads)
    child, expected = tensors(tmp_path / "child"), naive.group_state_dict(parent, heads, "first")
    shared = child.keys() & expected.keys()
    assert_same_tensors({k: child[k] for k in shared}, {k: expected[k] for k in shared})
    assert_same_tensors(expected, different)  # the first heads are what the others were set to


def test_a_checkpoint_of_several_dtypes_keeps_each(saved: Saved, tmp_path: Path) -> None:
    state = tensors(saved("llama"))
    mixed = {
        k: v.double() if "norm" in k else v.to(torch.bfloat16 if "v_proj" in k else torch.float16)
        for k, v in state.items()
    }
    parent = write(tmp_path / "parent", config_of(saved("llama")), mixed)
    convert_heads(parent, tmp_path / "child", head_map("llama", "one"))
    assert {k: v.dtype for k, v in tensors(tmp_path / "child").items()} == {k: v.dtype for k, v in mixed.items()}


@pytest.mark.parametrize("method", ["mean", "random"])
@pytest.mark.parametrize("name", ["llama", "stablelm_norm", "gpt2", "t5"])
def test_shards_give_what_one_file_gives(name: str, method: str, saved: Saved, tmp_path: Path) -> None:
    state, heads = tensors(saved(name)), head_map(name, "some")
    shards = scattered(list(state))
    note = {"made_by": "hand", "步": "é"}
    parent = write(tmp_path / "sharded", config_of(saved(name)), state, shards=shards, note=note)
    files_of = {name: file for file, names in shards.items() for name in names}
    if name == "llama":
        where = {files_of[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "kv"}
        assert len(where) == 2  # keys and values of a layer in different shards
    convert_heads(parent, tmp_path / "child", heads, method=method)
    convert_heads(saved(name), tmp_path / "single", heads, method=method)
    child = tensors(tmp_path / "child")
    assert_same_tensors(child, tensors(tmp_path / "single"))

    assert sorted(path.name for path in (tmp_path / "child").glob("*.safetensors")) == sorted(shards)
    index = json.loads((tmp_path / "child" / INDEX).read_text(encoding="utf-8"))
    assert index["weight_map"] == {key: file for key, file in files_of.items() if key in child}
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in child.values()),
        "total_parameters": sum(tensor.numel() for tensor in child.values()),
        "made_by": "hand",
    }
    for file in shards:
        assert metadata(tmp_path / "child" / file) == {"format": "pt", **note}
    assert not (tmp_path / "single" / INDEX).exists()
    regroup.load(tmp_path / "child")


def test_transformers_own_shards(tmp_path: Path) -> None:
    parent = tiny.save("llama", tmp_path / "parent", max_shard_size=20_000)
    files = sorted(path.name for path in parent.glob("*.safetensors"))
    assert len(files) > 3
    convert_heads(parent, tmp_path / "child", head_map("llama", "one"))
    assert sorted(path.name for path in (tmp_path / "child").glob("*.safetensors")) == files
    convert_heads(tiny.save("llama", tmp_path / "whole"), tmp_path / "single", head_map("llama", "one"))
    assert_same_tensors(tensors(tmp_path / "child"), tensors(tmp_path / "single"))


def test_a_shard_that_loses_all_its_tensors(saved: Saved, tmp_path: Path) -> None:
    state = tensors(saved("stablelm_norm"))
    gone = [key for key in state if key.endswith(("k_layernorm.norms.4.weight", "k_layernorm.norms.5.weight"))]
    shards = {"a.safetensors": [key for key in state if key not in gone], "b.safetensors": gone}
    parent = write(tmp_path / "parent", config_of(saved("stablelm_norm")), state, shards=shards)
    convert_heads(parent, tmp_path / "child", head_map("stablelm_norm", "one"))
    convert_heads(saved("stablelm_norm"), tmp_path / "single", head_map("stablelm_norm", "one"))
    assert_same_tensors(tensors(tmp_path / "child"), tensors(tmp_path / "single"))
    layout_of(tmp_path / "child")
    regroup.load(tmp_path / "child")


COMPANIONS = {
    "tokenizer.json": b"{}",
    "generation_config.json": b'{"do_sample": true}',
    "chat_template.jinja": b"{{ x }}",
    "LICENSE": b"all rights\r\n",
    "vocab/words.txt": b"\xff\x00",
}
STALE = [
    *("pytorch_model.bin", "pytorch_model.bin.index.json", "model.gguf", "consolidated.00.pth", "tf_model.h5"),
    *("other.safetensors", "flax_model.msgpack", "onnx/model.onnx", "modeling_own.py", "onnx/model.onnx_data"),
    *(".gitattributes", ".cache/huggingface/x.json"),
]


def test_companions_come_along_and_stale_weights_do_not(saved: Saved, tmp_path: Path) -> None:
    parent = copy(saved("opt"), tmp_path / "parent")
    for path, content in (COMPANIONS | dict.fromkeys(STALE, b"stale")).items():
        (parent / path).parent.mkdir(parents=True, exist_ok=True)
        (parent / path).write_bytes(content)
    convert_heads(parent, tmp_path / "child", head_map("opt", "one"))
    for path, content in COMPANIONS.items():
        assert (tmp_path / "child" / path).read_bytes() == content
    written = {"config.json", "model.safetensors", "README.md", "regroup_plan.json", "modeling_regroup.py"}
    assert set(digests(tmp_path / "child")) == COMPANIONS.keys() | written
    assert (tmp_path / "child").stat().st_mode & 0o777 == (parent.stat().st_mode & 0o777)


def test_records_of_the_parents_own_conversion_stay_behind(saved: Saved, tmp_path: Path) -> None:
    """`verify` compares no merged tensor where a record of calibration lies beside them."""
    parent = copy(saved("llama"), tmp_path / "parent")
    for name in ("regroup_calibration.json", "regroup_result.json"):
        (parent / name).write_text("{}")
    regroup.convert(parent, tmp_path / "child", kv_heads=2, method="mean")
    assert [path.name for path in (tmp_path / "child").glob("regroup_*")] == ["regroup_plan.json"]


def card_of(folder: Path) -> tuple[dict[str, Any], str]:
    _, head, body = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(head), body


def test_the_card_names_parent_plan_and_versions(saved: Saved, tmp_path: Path) -> None:
    parent = copy(saved("llama"), tmp_path / "my-parent")
    (parent / "README.md").write_text(
        "---\nlicense: cc-by-4.0\nlanguage: [en, de]\ntags: [old]\nbase_model: someone/else\n---\nThe parent's words.\n"
    )
    regroup.convert(parent, tmp_path / "child", layers="0:3,1-2:1", method="mean")
    head, body = card_of(tmp_path / "child")
    assert (head["license"], head["language"]) == ("cc-by-4.0", ["en", "de"])
    assert head["tags"] == ["grouped-query-attention", "regroup"]
    assert "base_model" not in head  # a folder is no hub id
    plan = Plan.load(tmp_path / "child" / "regroup_plan.json")
    versions = [importlib.metadata.version(name) for name in ("regroup-gqa", "torch", "transformers")]
    for word in ["my-parent", plan.digest(), "trust_remote_code=True", "| 2 | 6 | 1 | mean | mean |", *versions]:
        assert word in body
    assert "The parent's words" not in body
    assert str(tmp_path) not in body

    checkpoint, layout = open_checkpoint(parent), layout_of(parent)
    opened = Source("owner/name", parent, checkpoint, layout)
    carry_out(opened, prepare(checkpoint, layout, make_plan(layout, 2)), tmp_path / "stock")
    head, body = card_of(tmp_path / "stock")
    assert head["base_model"] == "owner/name"
    assert "trust_remote_code" not in body


def test_a_card_that_cannot_be_read_is_refused(saved: Saved, tmp_path: Path) -> None:
    parent = copy(saved("llama"), tmp_path / "parent")
    for head in ("license: [unclosed", "- a list"):
        (parent / "README.md").write_text(f"---\n{head}\n---\ntext\n")
        with pytest.raises(RegroupError, match=r"model card.*\n.*README\.md"):
            regroup.convert(parent, tmp_path / "child", kv_heads=1, calibration="none")
        assert not (tmp_path / "child").exists()


def test_a_card_without_metadata_is_taken_quietly(
    saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parent = copy(saved("llama"), tmp_path / "parent")
    with caplog.at_level("WARNING"):
        for words, expected in (("## Uptraining\n", None), ("---\nlicense: mit\n---\n# Name\n", "mit")):
            (parent / "README.md").write_text(words)
            regroup.convert(parent, tmp_path / f"child-{expected}", kv_heads=1, method="mean")
            assert card_of(tmp_path / f"child-{expected}")[0].get("license") == expected
    assert not caplog.records


@pytest.mark.parametrize("method", ["mean", "random"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_workers_and_repetition_change_no_byte(name: str, method: str, saved: Saved, tmp_path: Path) -> None:
    state = tensors(saved(name))
    parent = write(tmp_path / "parent", config_of(saved(name)), state, shards=scattered(list(state)))
    made = []
    for number, workers in enumerate((1, 2, 2, 5)):
        target = tmp_path / str(number)
        convert_heads(parent, target, head_map(name, "mixed"), method=method, workers=workers)
        made.append(digests(target))
    assert made[0] == made[1] == made[2] == made[3]
    convert_heads(parent, tmp_path / "other", head_map(name, "one"), method=method)
    assert digests(tmp_path / "other") != made[0]


def test_random_heads_depend_on_the_seed_alone(saved: Saved, tmp_path: Path) -> None:
    made = {}
    for number, seed in enumerate((0, 0, 1)):
        regroup.convert(saved("gpt2"), tmp_path / str(number), kv_heads=2, method="random", seed=seed)
        made[number] = tensors(tmp_path / str(number))
    assert_same_tensors(made[0], made[1])
    with pytest.raises(AssertionError):
        assert_same_tensors(made[2], made[0])
    fused = made[0]["transformer.h.0.attn.c_attn.weight"]
    key, value = fused[:, 48:64], fused[:, 64:80]
    assert not torch.equal(key, value)
    assert not torch.equal(key[:, :8], key[:, 8:])
    assert torch.equal(fused[:, :48], tensors(saved("gpt2"))["transformer.h.0.attn.c_attn.weight"][:, :48])
    assert 0.01 < fused[:, 48:].std() < 0.03  # GPT-2's initializer_range is 0.02
    regroup.convert(saved("gpt2"), tmp_path / "same", kv_heads=6, method="random")
    assert_same_tensors(tensors(tmp_path / "same"), tensors(saved("gpt2")))


def test_keys_and_values_by_different_rules(saved: Saved, tmp_path: Path) -> None:
    plan = make_plan(layout_of(saved("llama")), 2)
    mixed = replace(plan, layers=tuple(replace(x, key_method="first", value_method="mean") for x in plan.layers))
    carried_out(saved("llama"), mixed, tmp_path / "child")
    before, after = tensors(saved("llama")), tensors(tmp_path / "child")
    prefix = "model.layers.1.self_attn."
    key = before[f"{prefix}k_proj.weight"].view(2, 3, 10, -1)
    value = before[f"{prefix}v_proj.weight"].view(2, 3, 10, -1)
    assert torch.equal(after[f"{prefix}k_proj.weight"].view(2, 10, -1), key[:, 0])
    assert torch.equal(after[f"{prefix}v_proj.weight"].view(2, 10, -1), value.double().mean(1).float())


class Counting(Listener):
    """Counts the bytes that are written."""

    def __init__(self, written: list[int]) -> None:
        self.written = written

    def writing(self, nbytes: int) -> Any:
        return contextlib.nullcontext(self.written.append)


def test_preview_says_what_is_written(saved: Saved, tmp_path: Path) -> None:
    checkpoint, layout = open_checkpoint(saved("bart")), layout_of(saved("bart"))
    plan = plan_for(layout, head_map("bart", "mixed"))
    ahead, written = preview(checkpoint, layout, plan), []
    carried_out(saved("bart"), plan, tmp_path / "child", listener=Counting(written))
    child = tensors(tmp_path / "child")
    before = tensors(saved("bart"))
    assert ahead.shards["model.safetensors"].keys() == child.keys()
    assert ahead.bytes_before == sum(x.nbytes for x in before.values())
    assert ahead.bytes_after == sum(x.nbytes for x in child.values()) == sum(written)
    assert ahead.changed.keys() == {key for key in child if not torch.equal(child[key], before[key])}
    assert ahead.kv_bytes_before == 6 * 2 * 6 * 8 * 4
    assert ahead.kv_bytes_after == sum(head_map("bart", "mixed").values()) * 2 * 8 * 4


@pytest.mark.parametrize(("name", "stock"), [("llama", {6, 3, 2, 1}), ("gpt_bigcode", {6, 1}), ("gpt2", {6})])
def test_stock_classes_are_used_where_they_can_be(name: str, stock: set[int], saved: Saved, tmp_path: Path) -> None:
    for groups in (6, 3, 2, 1):
        child = tmp_path / str(groups)
        regroup.convert(saved(name), child, kv_heads=groups, calibration="none")
        config = config_of(child)
        assert ("regroup" in config) == (groups not in stock)
        assert (child / "modeling_regroup.py").exists() == (groups not in stock)
        assert config["architectures"][0].startswith("Regroup") == (groups not in stock)


def test_back_to_a_stock_class(saved: Saved, tmp_path: Path) -> None:
    regroup.convert(saved("llama"), tmp_path / "mixed", layers="0:2", method="mean")
    assert config_of(tmp_path / "mixed")["architectures"] == ["RegroupLlamaForCausalLM"]
    regroup.convert(tmp_path / "mixed", tmp_path / "one", layers="0-2:1", method="mean")
    config = config_of(tmp_path / "one")
    assert (config["architectures"], config["num_key_value_heads"]) == (["LlamaForCausalLM"], 1)
    assert not config.keys() & {"regroup", "auto_map"}
    regroup.convert(saved("llama"), tmp_path / "direct", kv_heads=1, method="mean")
    direct, steps = tensors(tmp_path / "direct"), tensors(tmp_path / "one")
    assert max(steps_apart(direct[k], steps[k]) for k in direct if "k_proj" not in k and "v_proj" not in k) == 0
    for key in direct:  # a mean of means rounds once more
        torch.testing.assert_close(steps[key], direct[key], atol=1e-6, rtol=1e-6)


def test_missing_architectures_are_refused_where_a_class_is_needed(saved: Saved, tmp_path: Path) -> None:
    parent = copy(saved("opt"), tmp_path / "parent")
    config = config_of(parent)
    del config["architectures"]
    (parent / "config.json").write_text(json.dumps(config))
    message = refused("convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none")
    assert "architectures" in message
    assert not (tmp_path / "child").exists()


CODE = "from pathlib import Path\nPath({marker!r}).touch()\n"


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_code_of_the_source_is_never_run(name: str, saved: Saved, tmp_path: Path) -> None:
    parent, marker = copy(saved(name), tmp_path / "parent"), tmp_path / "it-ran"
    for file in ("modeling_own.py", "configuration_own.py"):
        (parent / file).write_text(CODE.format(marker=str(marker)))
    config = config_of(parent) | {
        "auto_map": {
            "AutoConfig": "configuration_own.Own",
            "AutoModel": "modeling_own.Own",
            "AutoModelForCausalLM": "modeling_own.Own",
        }
    }
    (parent / "config.json").write_text(json.dumps(config))
    status, _, message = run("convert", parent, tmp_path / "child", "--kv-heads", 2, "--calibration", "none")
    assert status == 0, message
    assert "neither run nor copied" in message
    assert run("inspect", parent)[0] == run("plan", parent, "--kv-heads", 2)[0] == 0
    child = config_of(tmp_path / "child")
    assert "own" not in json.dumps(child.get("auto_map", {}))
    assert not list((tmp_path / "child").glob("*own*"))
    regroup.load(tmp_path / "child")
    regroup.load(parent)
    assert not marker.exists()
    exec(compile((parent / "modeling_own.py").read_text(), "own", "exec"))  # the marker works
    assert marker.exists()


def test_a_deci_config_becomes_a_llama(saved: Saved, tmp_path: Path) -> None:
    heads = head_map("llama", "mixed")
    convert_heads(saved("llama"), tmp_path / "mixed", heads)
    config = config_of(saved("llama")) | {
        "model_type": "deci",
        "architectures": ["DeciLMForCausalLM"],
        "num_key_value_heads_per_layer": list(heads.values()),
        "auto_map": {"AutoModelForCausalLM": "modeling_decilm.DeciLMForCausalLM"},
    }
    parent = write(tmp_path / "deci", config, tensors(tmp_path / "mixed"))
    assert [x.num_key_value_heads for x in layout_of(parent).layers] == list(heads.values())
    convert_heads(parent, tmp_path / "one", head_map("llama", "one"))
    child = config_of(tmp_path / "one")
    assert (child["model_type"], child["architectures"]) == ("llama", ["LlamaForCausalLM"])
    regroup.load(tmp_path / "one")
    convert_heads(parent, tmp_path / "same", heads)
    assert_same_tensors(tensors(tmp_path / "same"), tensors(parent))
    regroup.load(tmp_path / "same")
