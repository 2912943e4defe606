"""Tied weights: what the families' rows say of them against transformers' own classes, and what becomes of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import regroup
import tiny
from helpers import config_of, copy, edit_json, logits, refused, run, tensors, write
from regroup.layout import detect
from regroup.layout.families import FAMILIES, family_for, stored_ties, ties
from regroup.opening import open_source
from regroup.uptraining.export import check_names, write_model

Saved = Callable[[str], Path]
ROWS = [name for name in tiny.FAMILIES if "_" not in name or name in FAMILIES]


@pytest.mark.parametrize("model_type", sorted(FAMILIES.keys() - {"deci"}))
def test_whether_a_family_ties_where_its_config_does_not_say(model_type: str) -> None:
    default = transformers.CONFIG_MAPPING[model_type]()
    assert FAMILIES[model_type].ties == default.tie_word_embeddings
    family = FAMILIES[model_type]
    assert ties({}, family) == family.ties
    assert not ties({"tie_word_embeddings": False}, family)
    assert ties({"tie_word_embeddings": True}, family)


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("tie", [True, False])
def test_the_tied_names_are_those_of_the_class(name: str, tie: bool) -> None:
    facts = tiny.FAMILIES[name]
    config = getattr(transformers, facts.config_class)(**{**facts.kwargs, "tie_word_embeddings": tie})
    with torch.device("meta"):
        model = getattr(transformers, facts.model_class)(config)
    row = FAMILIES[facts.model_type]
    assert model.all_tied_weights_keys == (dict(row.tied) if tie or row.always_ties else {})


def with_own_head(folder: Path, target: Path) -> tuple[Path, str]:
    """A checkpoint whose config ties, and which stores a head beside the embedding that is another."""
    copy(folder, target)
    config, state = config_of(target), tensors(target)
    family = family_for(config)
    assert family is not None
    head, embedding = family.tied[0]
    state[head] = state[embedding].flip(0).contiguous()
    for file in target.glob("*.safetensors*"):
        file.unlink()
    config["tie_word_embeddings"] = True
    return write(target, config, state), head


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart", "whisper", "t5", "falcon", "cohere"])
def test_a_stored_head_of_its_own_survives(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, head = with_own_head(saved(name), tmp_path / "in")
    stored = tensors(folder)
    with open_source(str(folder)) as opened:
        assert opened.layout.tied_embeddings is False
    H = tiny.FAMILIES[name].num_attention_heads
    regroup.convert(folder, tmp_path / "out", kv_heads=H, method="mean")
    assert torch.equal(tensors(tmp_path / "out")[head], stored[head])
    stock = getattr(transformers, tiny.FAMILIES[name].model_class)
    before = logits(stock.from_pretrained(folder).eval(), name)
    after = logits(stock.from_pretrained(tmp_path / "out").eval(), name)
    assert torch.equal(before, after)
    # An engine that believes the config would put the embedding in the head's place.
    ties_more = len(FAMILIES[tiny.FAMILIES[name].model_type].tied) > 1
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is ties_more
    # The other side: a head that is the embedding is no head of its own, and the config stays as it was.
    tied = tensors(folder)
    tied[head] = tied[dict(FAMILIES[tiny.FAMILIES[name].model_type].tied)[head]].clone()
    same = write(tmp_path / "same", config_of(folder), tied)
    with open_source(str(same)) as opened:
        assert opened.layout.tied_embeddings is True
    regroup.convert(same, tmp_path / "tied", kv_heads=H, method="mean")
    assert config_of(tmp_path / "tied")["tie_word_embeddings"] is True
    assert not torch.equal(logits(stock.from_pretrained(tmp_path / "tied").eval(), name), before)


def test_heads_are_found_with_and_without_the_prefix() -> None:
    row = FAMILIES["gpt2"]
    assert stored_ties(row, {"wte.weight", "lm_head.weight"}) == [("lm_head.weight", "wte.weight")]
    assert stored_ties(row, {"transformer.wte.weight"}) == []


@pytest.mark.parametrize("name", [name for name in ROWS if not tiny.FAMILIES[name].untied_head])
@pytest.mark.parametrize("tie", [True, False])
def test_pickles_keep_of_tied_tensors_what_transformers_keeps(name: str, tie: bool, tmp_path: Path) -> None:
    facts = tiny.FAMILIES[name]
    config = getattr(transformers, facts.config_class)(**{**facts.kwargs, "tie_word_embeddings": tie})
    model: Any = getattr(transformers, facts.model_class)(config)
    tiny.randomize(model, std=0.2, seed=1)
    model.save_pretrained(tmp_path / "expected")
    folder = tmp_path / "pickled"
    folder.mkdir()
    state = model.state_dict()
    shared = len({tensor.data_ptr() for tensor in state.values()}) < len(state)
    assert shared or not (tie or FAMILIES[facts.model_type].always_ties)
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config_of(tmp_path / "expected")))
    H = facts.num_attention_heads
    regroup.convert(folder, tmp_path / "out", kv_heads=H, method="mean", allow_pickle=True)
    # What transformers computes instead of storing is in a state as well.
    ignored = {"final_logits_bias", "model.encoder.embed_positions.weight", "model.decoder.embed_positions.weight"}
    found, expected = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    if name == "gpt_neox" and not tie:
        expected["lm_head.weight"] = expected.pop("embed_out.weight")  # renamed as it is saved
    pairs = {target for target, _ in FAMILIES[facts.model_type].tied}
    assert found.keys() & pairs == expected.keys() & pairs
    more = found.keys() ^ expected.keys()
    assert more <= ignored or facts.model_type in ("mixtral", "qwen2_moe")  # whose experts are stored one by one


def test_shared_memory_of_what_is_not_tied_gets_its_own_bytes(saved: Saved, tmp_path: Path) -> None:
    folder = copy(saved("llama"), tmp_path / "in")
    state = tensors(folder)
    (folder / "model.safetensors").unlink()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    torch.save(state, folder / "pytorch_model.bin")
    regroup.convert(folder, tmp_path / "untied", kv_heads=6, method="mean", allow_pickle=True)
    assert "lm_head.weight" in tensors(tmp_path / "untied")
    edit_json(folder / "config.json", tie_word_embeddings=True)
    regroup.convert(folder, tmp_path / "tied", kv_heads=6, method="mean", allow_pickle=True)
    assert "lm_head.weight" not in tensors(tmp_path / "tied")
    # A view of the same memory with another shape is another tensor.
    state["lm_head.weight"] = state["model.embed_tokens.weight"].flip(0)
    torch.save(state, folder / "pytorch_model.bin")
    regroup.convert(folder, tmp_path / "own", kv_heads=6, method="mean", allow_pickle=True)
    assert torch.equal(tensors(tmp_path / "own")["lm_head.weight"], state["lm_head.weight"])


def test_the_config_alone_says_what_the_class_does() -> None:
    config = {"model_type": "gpt2", "n_head": 4, "n_layer": 1, "n_embd": 16}
    assert detect(config).tied_embeddings is True
    assert detect({**config, "tie_word_embeddings": False}).tied_embeddings is False


def test_a_stored_head_of_its_own_survives_every_export(saved: Saved, tmp_path: Path) -> None:
    from gguf import GGUFReader

    folder, head = with_own_head(saved("llama"), tmp_path / "in")
    stored = tensors(folder)
    for to in ("hf", "vllm"):
        assert run("export", folder, tmp_path / to, "--to", to, "--no-check")[0] == 0
        assert torch.equal(tensors(tmp_path / to)[head], stored[head])
        assert config_of(tmp_path / to)["tie_word_embeddings"] is False  # vLLM would tie, and ignore the head
    assert run("export", folder, tmp_path / "x.gguf", "--to", "gguf", "--no-check")[0] == 0
    found = {one.name: one.data for one in GGUFReader(tmp_path / "x.gguf").tensors}
    assert torch.equal(torch.tensor(found["output.weight"]), stored[head])
    # llama.cpp takes the embedding where the file has no head: the other side.
    stored[head] = stored["model.embed_tokens.weight"].clone()
    same = write(tmp_path / "same", config_of(folder), stored)
    assert run("export", same, tmp_path / "y.gguf", "--to", "gguf", "--no-check")[0] == 0
    assert "output.weight" not in {one.name for one in GGUFReader(tmp_path / "y.gguf").tensors}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_stored_head_of_its_own_survives_training(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, head = with_own_head(saved(name), tmp_path / "in")
    model: Any = regroup.load(folder, dtype=torch.float32, progress=False)
    checkpoint = regroup.open_checkpoint(folder)
    check_names(checkpoint, model, values=True)
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(0.25)
    write_model(checkpoint, model, tmp_path / "out")
    before, after = tensors(folder), tensors(tmp_path / "out")
    torch.testing.assert_close(after[head], before[head] + 0.25)
    embedding = dict(FAMILIES[tiny.FAMILIES[name].model_type].tied)[head]
    assert torch.equal(after[embedding], before[embedding])


@pytest.mark.parametrize("name", ["bloom", "cohere", "gemma", "gemma2", "whisper"])
def test_a_head_of_its_own_that_vllm_would_leave_out_is_refused(name: str, saved: Saved, tmp_path: Path) -> None:
    folder, _ = with_own_head(saved(name), tmp_path / "in")
    assert "head" in refused("export", folder, tmp_path / "own", "--to", "vllm", "--no-check")
    assert not (tmp_path / "own").exists()
    assert run("export", saved(name), tmp_path / "tied", "--to", "vllm", "--no-check")[0] == 0
    assert run("export", folder, tmp_path / "hf", "--to", "hf", "--no-check")[0] == 0
