"""GGUF files: what is written, what llama.cpp and transformers answer of it, and files as sources."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import gguf
import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor

import regroup
import tiny
from helpers import assert_same_tensors, bits, config_of, copy, everything, layout_of, logits, refused, run, tensors
from regroup.exports import gguf_target, llama_cpp
from regroup.exports.gguf_check import greedy_agreement
from regroup.exports.gguf_tokenizer import vocabulary
from regroup.modeling import load, load_tokenizer

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]

STORIES = Path(__file__).parents[3] / "shared/models/stories260k"
needs_stories = pytest.mark.skipif(not STORIES.is_dir(), reason="the model is not in shared/models")
needs_llama_cpp = pytest.mark.skipif(not llama_cpp.installed(), reason="llama-cpp-python is not installed")


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_cpp, "installed", lambda: False)


def said(*arguments: object) -> str:
    status, out, message = run("export", *arguments)
    assert (status, out) == (0, ""), message
    return " ".join(message.split())


def written(file: Path) -> dict[str, Tensor]:
    """Every tensor of a GGUF file in its dtype, read by the format's library."""
    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {}
    for tensor in gguf.GGUFReader(str(file)).tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        raw = torch.frombuffer(bytearray(tensor.data.tobytes()), dtype=kinds[tensor.tensor_type.name])
        found[tensor.name] = raw.view(shape)
    return found


def fields(file: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(str(file)).fields.items()}


def rewritten(
    file: Path, *, rename: dict[str, str | None] | None = None, add: dict[str, Any] | None = None, **values: Any
) -> None:
    """The same GGUF file with other tensors (a name of None leaves one out) and other values of keys."""
    reader = gguf.GGUFReader(str(file))
    kept = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    writer = gguf.GGUFWriter(file.with_suffix(".new"), str(reader.fields["general.architecture"].contents()))
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        short = name.rpartition(".")[2]
        if values.get(short, field) is not None:
            writer.add_key_value(
                name,
                values.get(short, field.contents()),
                field.types[0],
                field.types[-1] if len(field.types) > 1 else None,
            )
    for name, array in [*kept.items(), *(add or {}).items()]:
        target = (rename or {}).get(name, name)
        if target is not None:
            writer.add_tensor(target, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file.with_suffix(".new").replace(file)


def changed(name: str, tmp_path: Path, **changes: Any) -> Path:
    """A tiny checkpoint of a family with other settings."""
    family = tiny.FAMILIES[name]
    config = getattr(transformers, family.config_class)(**{**family.kwargs, **changes})
    model = getattr(transformers, family.model_class)(config)
    tiny.randomize(model, std=family.weight_std, seed=3)
    model.save_pretrained(tmp_path / "original")
    return tmp_path / "original"


class TestWritten:
    """What a file holds, without any engine."""

    @pytest.mark.parametrize("kind", ["some", "mixed"])
    def test_every_tensor_is_there(self, kind: str, converted: Converted, tmp_path: Path) -> None:
        source = converted("llama", kind)
        said(source, tmp_path / "m.gguf", "--to", "gguf", "--no-check")
        state, found = tensors(source), written(tmp_path / "m.gguf")
        assert len(found) == len(state)
        for index, layer in enumerate(layout_of(source).layers):
            for part, heads in (("q", 6), ("k", layer.num_key_value_heads)):
                rows = state[f"model.layers.{index}.self_attn.{part}_proj.weight"]
                # Row by row: GGML turns neighbours, so what turned with i + D / 2 comes next to i.
                D = 10
                order = [h * D + i + half * D // 2 for h in range(heads) for i in range(D // 2) for half in (0, 1)]
                assert torch.equal(found[f"blk.{index}.attn_{part}.weight"], torch.stack([rows[r] for r in order]))
                assert not torch.equal(found[f"blk.{index}.attn_{part}.weight"], rows)
            value = state[f"model.layers.{index}.self_attn.v_proj.weight"]
            assert torch.equal(bits(found[f"blk.{index}.attn_v.weight"]), bits(value))
        assert torch.equal(found["token_embd.weight"], state["model.embed_tokens.weight"])
        assert torch.equal(found["output.weight"], state["lm_head.weight"])

    def test_heads_are_named(self, converted: Converted, tmp_path: Path) -> None:
        message = said(converted("llama", "mixed"), tmp_path / "mixed.gguf", "--to", "gguf", "--no-check")
        assert "not checked: --no-check" in message
        assert "has no tokenizer" in message
        found = fields(tmp_path / "mixed.gguf")
        assert found["general.architecture"] == "deci"
        assert found["deci.attention.head_count_kv"] == [3, 2, 1]
        assert found["deci.attention.head_count"] == [6, 6, 6]
        said(converted("llama", "one"), tmp_path / "one.gguf", "--to", "gguf", "--no-check")
        found = fields(tmp_path / "one.gguf")
        assert (found["general.architecture"], found["llama.attention.head_count_kv"]) == ("llama", 1)
        assert (found["llama.attention.key_length"], found["llama.rope.dimension_count"]) == (10, 10)

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_matrices_are_rounded_once_and_vectors_are_not(
        self, dtype: str, converted: Converted, tmp_path: Path
    ) -> None:
        said(converted("llama", "some"), tmp_path / "m.gguf", "--to", "gguf", "--no-check", "--dtype", dtype)
        state, found = tensors(converted("llama", "some")), written(tmp_path / "m.gguf")
        down = state["model.layers.1.mlp.down_proj.weight"]
        assert torch.equal(bits(found["blk.1.ffn_down.weight"]), bits(down.to(getattr(torch, dtype))))
        norm = state["model.layers.1.input_layernorm.weight"]
        assert torch.equal(bits(found["blk.1.attn_norm.weight"]), bits(norm))

    def test_what_float16_does_not_hold_is_refused(self, saved: Saved, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        source = copy(saved("llama"), tmp_path / "source")
        state = tensors(source)
        state["lm_head.weight"][3, 3] = 1e5
        save_file(state, source / "model.safetensors")
        message = refused("export", source, tmp_path / "m.gguf", "--to", "gguf", "--dtype", "float16", "--no-check")
        assert "too large for float16" in message
        assert "output.weight" in message
        assert [name for name in everything(tmp_path) if not name.startswith("source")] == []

    def test_an_existing_file_is_left_alone(self, saved: Saved, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_text("mine")
        assert "exists already" in refused("export", saved("llama"), tmp_path / "m.gguf", "--to", "gguf")
        assert (tmp_path / "m.gguf").read_text() == "mine"
        assert everything(tmp_path) == ["m.gguf"]

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"hidden_act": "gelu"}, ("activation", "silu", "gelu")),
            (
                {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
                ("rotary scaling", "default or linear or llama3", "dynamic"),
            ),
        ],
    )
    def test_what_cannot_be_said_is_refused(
        self, changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path
    ) -> None:
        message = refused("export", changed("llama", tmp_path, **changes), tmp_path / "m.gguf", "--to", "gguf")
        assert [word for word in words if word not in message] == []
        assert not (tmp_path / "m.gguf").exists()

    def test_a_disk_without_links(self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(*_: Any) -> None:
            raise PermissionError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", link)
        said(saved("llama"), tmp_path / "new" / "m.gguf", "--to", "gguf", "--no-check")
        assert everything(tmp_path) == ["new", "new/m.gguf"]

        def appears(*_: Any) -> None:
            (tmp_path / "n.gguf").write_text("mine")
            link()

        monkeypatch.setattr(os, "link", appears)
        message = refused("export", saved("llama"), tmp_path / "n.gguf", "--to", "gguf", "--no-check")
        assert "the destination appeared" in message
        assert (tmp_path / "n.gguf").read_text() == "mine"
        assert everything(tmp_path) == ["n.gguf", "new", "new/m.gguf"]

    def test_a_disk_that_fails_at_the_name(self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def link(*_: Any) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(os, "link", link)
        message = refused("export", saved("llama"), tmp_path / "new" / "m.gguf", "--to", "gguf", "--no-check")
        assert "the system refused to read or to write; nothing was left behind" in message
        assert everything(tmp_path) == []

    def test_what_a_killed_export_left_goes(self, saved: Saved, tmp_path: Path) -> None:
        (tmp_path / ".m.gguf.regroup-killed").mkdir()
        (tmp_path / ".m.gguf.regroup-killed" / "m.gguf").write_text("half")
        regroup.export(str(saved("llama")), str(tmp_path / "m.gguf"), to="gguf", check=False)
        assert everything(tmp_path) == ["m.gguf"]

    def test_other_families_are_refused(self, saved: Saved, tmp_path: Path) -> None:
        message = refused("export", saved("gpt2"), tmp_path / "m.gguf", "--to", "gguf")
        assert "not written as GGUF" in message
        assert "needs a suffix" in refused("export", saved("llama"), tmp_path / "m", "--to", "gguf")
        assert everything(tmp_path) == []


@pytest.mark.usefixtures("without_llama_cpp")
class TestThroughTransformers:
    """The check where llama-cpp-python is not installed, and files as sources."""

    @pytest.mark.parametrize(
        ("name", "changes"), [("llama", {}), ("llama_grouped", {}), ("qwen2", {}), ("qwen2", {"max_window_layers": 9})]
    )
    def test_its_loader_computes_the_same(self, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
        message = said(changed(name, tmp_path, **changes), tmp_path / "m.gguf", "--to", "gguf")
        assert "'s GGUF loader: identical logits" in message

    def test_a_wrong_order_of_rows_is_found(
        self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gguf_target, "neighbours", lambda rows, heads: rows)
        message = refused("export", saved("llama"), tmp_path / "m.gguf", "--to", "gguf")
        assert "differs from its source" in message
        assert everything(tmp_path) == []

    def test_deci_says_what_nobody_looked_at(self, converted: Converted, tmp_path: Path) -> None:
        message = said(converted("llama", "mixed"), tmp_path / "m.gguf", "--to", "gguf")
        assert "logits were not compared with llama.cpp: llama-cpp-python is not installed" in message
        assert "logits were not compared otherwise either" in message
        assert "tensors bit for bit" in message

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_there_and_back(self, dtype: str, converted: Converted, tmp_path: Path) -> None:
        source = converted("llama", "some")
        said(source, tmp_path / "m.gguf", "--to", "gguf", "--dtype", dtype, "--no-check")
        message = said(tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        assert "against its GGUF loader: identical logits" in message
        wanted = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(source).items()}
        assert_same_tensors(tensors(tmp_path / "back"), wanted)
        if dtype == "float32":
            assert torch.allclose(logits(load(tmp_path / "back").eval(), "llama"), logits(load(source).eval(), "llama"))

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("llama_bias", {}),
            ("llama_bias", {"mlp_bias": True}),
            ("llama", {"tie_word_embeddings": True}),
            ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}}),
            ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
            ("llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5, "original_max_position_embeddings": 8192}}),
        ],
    )
    def test_what_its_loader_would_lose_is_kept(self, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
        source = changed(name, tmp_path, **changes)
        message = said(source, tmp_path / "m.gguf", "--to", "gguf")
        assert "settings are the checkpoint's" in message
        message = said(tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        assert "in the checkpoint, bit for bit" in message
        assert_same_tensors(tensors(tmp_path / "back"), tensors(source))
        rope = config_of(tmp_path / "back")["rope_parameters"]
        wanted = config_of(source)["rope_parameters"]
        assert {key: rope[key] for key in ("rope_type", "rope_theta")} == {
            key: wanted[key] for key in ("rope_type", "rope_theta")
        }
        found, own = (logits(load(x).eval(), "llama") for x in (tmp_path / "back", source))
        assert torch.allclose(found, own, atol=1e-6 * float(own.abs().max()))

    def test_qwen3(self, tmp_path: Path) -> None:
        """An architecture that is a source alone, written here with the library's table of names."""
        config = transformers.Qwen3Config(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            vocab_size=40, intermediate_size=48, max_position_embeddings=64,
            rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        )  # fmt: skip
        model = transformers.Qwen3ForCausalLM(config)
        tiny.randomize(model, std=0.2, seed=3)
        writer = gguf.GGUFWriter(tmp_path / "m.gguf", "qwen3")
        for key, value in {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 48,
                           "head_count": 4, "head_count_kv": 2, "key_length": 16, "value_length": 16,
                           "layer_norm_rms_eps": 1e-6, "rope_freq_base": 1e6}.items():  # fmt: skip
            getattr(writer, f"add_{key}")(value)
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 2)
        for name, tensor in model.state_dict().items():
            writer.add_tensor(str(names.get_name(name, try_suffixes=(".weight",))), tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        message = said(tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        assert "in the checkpoint, bit for bit" in message
        assert_same_tensors(tensors(tmp_path / "back"), dict(model.state_dict()))
        ids = torch.arange(12)[None]
        assert torch.equal(cast(Any, load(tmp_path / "back"))(ids).logits, model(ids).logits)

    def test_without_a_number_of_kv_heads_there_are_as_many_as_queries(self, saved: Saved, tmp_path: Path) -> None:
        """The key is optional; transformers' loader, which stands in for llama.cpp, reads such a file wrongly."""
        said(saved("llama"), tmp_path / "m.gguf", "--to", "gguf", "--no-check")
        rewritten(tmp_path / "m.gguf", head_count_kv=None)
        assert "llama.attention.head_count_kv" not in fields(tmp_path / "m.gguf")
        said(tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        assert_same_tensors(tensors(tmp_path / "back"), tensors(saved("llama")))
        rewritten(tmp_path / "m.gguf", head_count=3)
        assert "attn" in refused("export", tmp_path / "m.gguf", tmp_path / "no", "--to", "hf")

    def test_factors_of_another_origin(self, saved: Saved, tmp_path: Path) -> None:
        """A list of factors that are no Llama 3's: what rotates is what the file says."""
        said(saved("llama"), tmp_path / "m.gguf", "--to", "gguf", "--no-check")
        factors = np.array([1.0, 1.5, 1.25, 3.0, 7.0], dtype=np.float32)
        rewritten(tmp_path / "m.gguf", add={"rope_freqs.weight": factors})
        said(tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        model = cast(Any, load(tmp_path / "back"))
        plain = 1e4 ** (-torch.arange(0, 10, 2).double() / 10)
        rotary = model.model.rotary_emb
        assert rotary.attention_scaling == 1.0
        assert torch.allclose(rotary.inv_freq.double(), plain / torch.from_numpy(factors).double(), rtol=1e-6)

    @pytest.mark.parametrize(
        ("source", "target"),
        [
            ("blk.1.ffn_gate.weight", None),
            ("output_norm.weight", None),
            ("blk.0.attn_q.weight", "blk.0.attn_gate.weight"),
            ("blk.0.attn_q.weight", "blk.0.attn_qkv.weight"),
            ("token_embd.weight", None),
        ],
    )
    def test_a_tensor_that_is_missing_or_unknown(
        self, source: str, target: str | None, saved: Saved, tmp_path: Path
    ) -> None:
        said(saved("llama"), tmp_path / "m.gguf", "--to", "gguf", "--no-check")
        rewritten(tmp_path / "m.gguf", rename={source: target})
        message = refused("export", tmp_path / "m.gguf", tmp_path / "back", "--to", "hf", "--no-check")
        assert "would lose" in message or "lacks a tensor" in message
        assert (target or source.split(".")[-2]) in message or "gate_proj" in message or "model.norm" in message
        assert not (tmp_path / "back").exists()

    def test_other_sources_and_targets_are_refused(self, converted: Converted, tmp_path: Path) -> None:
        said(converted("llama", "mixed"), tmp_path / "m.gguf", "--to", "gguf", "--no-check")
        message = refused("export", tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        assert "one number for all layers" in message
        message = refused("export", tmp_path / "m.gguf", tmp_path / "back", "--to", "vllm")
        assert "can only be exported to a plain checkpoint" in message
        (tmp_path / "broken.gguf").write_bytes(b"GGUFnot")
        assert "not a GGUF file" in refused("export", tmp_path / "broken.gguf", tmp_path / "back", "--to", "hf")


class Fixed:
    """A model whose choice after token t is t + 1, with t + 2 close behind."""

    def eval(self) -> Fixed:
        return self

    def __call__(self, input_ids: Tensor) -> Any:
        hot = torch.nn.functional.one_hot
        scores = 8.0 * hot((input_ids + 1) % 9, 9) + 7.999 * hot((input_ids + 2) % 9, 9)
        return SimpleNamespace(logits=scores)


def test_near_ties_are_accepted_and_other_tokens_are_not() -> None:
    def agree(made: list[int]) -> int:
        return greedy_agreement(Fixed(), [0, 1], made, "an engine", tolerance=1e-3)

    assert agree([2, 3, 4]) == 3
    assert agree([2, 4, 5]) == 2
    with pytest.raises(Exception, match=r"greedy tokens: \[2, 3, 6\]"):
        agree([2, 5, 6])
    assert agree([]) == 0


@needs_llama_cpp
class TestLlamaCpp:
    """llama.cpp's own answers."""

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("llama", {}),
            ("llama", {"tie_word_embeddings": True}),
            ("llama_bias", {"mlp_bias": True}),
            ("llama_grouped", {}),
            ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}}),
            ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
            (
                "llama",
                {
                    "rope_parameters": {
                        "rope_type": "llama3",
                        "rope_theta": 1e4,
                        "factor": 8.0,
                        "low_freq_factor": 1.0,
                        "high_freq_factor": 4.0,
                        "original_max_position_embeddings": 16,
                    }
                },
            ),
            ("mistral", {}),
            ("mistral_grouped", {}),
            ("qwen2", {}),
        ],
    )
    def test_families(self, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
        source = changed(name, tmp_path, **changes)
        assert "checked with llama-cpp-python" in said(source, tmp_path / "m.gguf", "--to", "gguf")

    @pytest.mark.parametrize(
        ("name", "changes"),
        [
            ("llama", {}),
            ("llama", {"tie_word_embeddings": True}),
            ("llama_bias", {"num_attention_heads": 6, "num_key_value_heads": 6}),
            ("llama_grouped", {}),
            ("mistral", {}),
            ("qwen2", {}),
        ],
    )
    def test_other_heads_in_each_layer(self, name: str, changes: dict[str, Any], tmp_path: Path) -> None:
        source = changed(name, tmp_path, **changes)
        assert run("convert", source, tmp_path / "result", "--layers", "0:2,1:1", "--method", "first")[0] == 0
        message = said(tmp_path / "result", tmp_path / "m.gguf", "--to", "gguf")
        assert "architecture deci" in message
        assert "checked with llama-cpp-python" in message

    @pytest.mark.parametrize("kind", ["some", "mixed"])
    def test_a_wrong_order_of_rows_is_found(
        self, kind: str, converted: Converted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gguf_target, "neighbours", lambda rows, heads: rows)
        message = refused("export", converted("llama", kind), tmp_path / "m.gguf", "--to", "gguf")
        assert "output differs from its source" in message
        assert everything(tmp_path) == []

    def test_a_file_that_it_does_not_load(self, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(gguf_target._ARCHITECTURES, "llama", gguf.MODEL_ARCH.FALCON)
        message = refused("export", saved("llama"), tmp_path / "m.gguf", "--to", "gguf")
        assert "llama.cpp" in message
        assert everything(tmp_path) == []

    @needs_stories
    @pytest.mark.parametrize("layers", [None, "0:4,1:2,2:1,3:4,4:2"])
    def test_a_real_model_tells_the_same_story(self, layers: str | None, tmp_path: Path) -> None:
        source = STORIES
        if layers is not None:
            source = tmp_path / "result"
            assert run("convert", STORIES, source, "--layers", layers, "--calibration", "none")[0] == 0
        message = said(source, tmp_path / "m.gguf", "--to", "gguf")
        assert "24 of 24 greedy tokens the same" in message
        said(STORIES, tmp_path / "stories.gguf", "--to", "gguf", "--no-check")
        answer = llama_cpp.ask(tmp_path / "stories.gguf", {"rows": [[1, 2]], "prompt": "Lily", "new_tokens": 12})
        tokenizer, model = load_tokenizer(STORIES), cast(Any, load(STORIES))
        prompt = tokenizer("Lily", return_tensors="pt")
        made = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        assert tokenizer.decode(made[0], skip_special_tokens=True) == "Lily" + answer["greedy_text"]

    @needs_stories
    def test_a_file_becomes_a_checkpoint(self, tmp_path: Path) -> None:
        said(STORIES, tmp_path / "m.gguf", "--to", "gguf", "--no-check")
        message = said(tmp_path / "m.gguf", tmp_path / "back", "--to", "hf")
        assert "against llama-cpp-python" in message
        assert_same_tensors(tensors(tmp_path / "back"), tensors(STORIES))
        text = "Once upon a time, Zoë said: 'Yes'!"
        assert load_tokenizer(tmp_path / "back")(text)["input_ids"] == load_tokenizer(STORIES)(text)["input_ids"]
        assert config_of(tmp_path / "back")["bos_token_id"] == 1


TEXT = "Once upon a time there was a girl named Lily. She'll count: 1, 22, 333!\n\n  Zoë didn't  mind.\n"


def byte_level(folder: Path, split: Any, size: int, *, ignore_merges: bool = False) -> Any:
    """A byte-level BPE tokenizer trained on a few words, with begin and end of sequence, saved beside a model."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    if split is None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    elif not isinstance(split, str):
        tokenizer.pre_tokenizer = split
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(split), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.save_pretrained(folder)
    return made


# The pre-tokenizers of some released models, as their tokenizer.json has them, and what llama.cpp calls them.
SUFFIXES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
QWEN2 = SUFFIXES + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SPLITS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (None, False),
    "qwen2": (QWEN2, False),
    "dbrx": (QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), False),
    "llama-bpe": (QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|"), True),
    "smollm": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
        False,
    ),
}


class TestTokenizers:
    """Vocabularies in GGUF's terms."""

    @pytest.fixture(params=SPLITS)
    def name(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_byte_level(self, name: str, tmp_path: Path) -> None:
        split, ignore = SPLITS[name]
        tokenizer = byte_level(tmp_path, split, 300, ignore_merges=ignore)
        found = vocabulary(tokenizer, 310)
        assert (found.model, found.pre) == ("gpt2", name)
        assert found.tokens[:2] == ["<s>", "</s>"]
        assert found.tokens[305] == "[PAD305]"
        assert (found.types[0], found.types[2], found.types[305]) == (3, 1, 5)
        assert (found.add_bos, found.add_eos) == (True, False)
        assert found.special == {"bos": 0, "eos": 1}
        assert len(found.merges) == len(json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"])

    @needs_llama_cpp
    def test_byte_level_in_llama_cpp(self, name: str, tmp_path: Path) -> None:
        split, ignore = SPLITS[name]
        source = changed("llama", tmp_path, vocab_size=300, bos_token_id=0, eos_token_id=1, pad_token_id=None)
        tokenizer = byte_level(source, split, 300, ignore_merges=ignore)
        message = said(source, tmp_path / "m.gguf", "--to", "gguf")
        assert "of 24 greedy tokens the same" in message
        assert "the same token ids for" in message
        answer = llama_cpp.ask(tmp_path / "m.gguf", {"texts": [TEXT]})
        assert answer["ids"] == [tokenizer(TEXT)["input_ids"]]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda t: setattr(t, "normalizer", normalizers.Lowercase()), "Lowercase"),
            (
                lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
                "add_prefix_space",
            ),
            (lambda t: setattr(t.model, "end_of_word_suffix", "</w>"), "end_of_word_suffix"),
            (lambda t: setattr(t.model, "ignore_merges", True), "ignore_merges"),
        ],
    )
    def test_byte_level_with_other_habits(self, change: Callable[[Any], None], words: str, tmp_path: Path) -> None:
        """Each would give other token ids in llama.cpp, some for rare texts alone."""
        tokenizer = byte_level(tmp_path, None, 300)
        backend = tokenizer.backend_tokenizer
        backend.normalizer = normalizers.NFC()
        assert vocabulary(tokenizer, 300).pre == "gpt-2"
        change(backend)
        with pytest.raises(Exception, match=words):
            vocabulary(tokenizer, 300)

    @needs_stories
    def test_sentencepiece(self) -> None:
        found = vocabulary(load_tokenizer(STORIES), 512)
        assert (found.model, found.pre, found.add_space_prefix) == ("llama", "default", True)
        assert [found.types[i] for i in (0, 1, 3, 259)] == [2, 3, 6, 1]
        ranks = [found.scores[found.tokens.index(token)] for token in ("▁t", "he", "▁a")]
        assert ranks == [-1.0, -2.0, -3.0]

    def test_others_are_refused(self, tmp_path: Path) -> None:
        unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
        with pytest.raises(Exception, match="no tokenizer like this one"):
            vocabulary(made, 10)
        with pytest.raises(Exception, match="at most 260 tokens"):
            vocabulary(byte_level(tmp_path, None, 300), 260)
        with pytest.raises(Exception, match="a way to cut text"):
            vocabulary(byte_level(tmp_path, r"\w+|\W+", 300), 300)
        lower = Tokenizer(models.BPE({"<unk>": 0, "a": 1}, [], byte_fallback=True, unk_token="<unk>"))
        lower.normalizer = normalizers.Lowercase()
        with pytest.raises(Exception, match="Lowercase"):
            vocabulary(transformers.PreTrainedTokenizerFast(tokenizer_object=lower, unk_token="<unk>"), 10)
