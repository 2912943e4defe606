"""Models without an output head are refused by what needs one, and converted and exported by what does not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import runs
import tiny
from helpers import copy, edit_json, refused, run

Saved = Callable[[str], Path]


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LlamaModel with the text and the tokenizer of ``runs.pair``, and a classifier beside it."""
    folder = tmp_path_factory.mktemp("bare")
    original, converted = runs.pair(folder)
    runs.text(folder)
    for name, cls in (("bare", transformers.LlamaModel), ("classifier", transformers.LlamaForSequenceClassification)):
        torch.manual_seed(0)
        cls(transformers.LlamaConfig.from_pretrained(original)).save_pretrained(folder / name)
        for file in converted.glob("tokenizer*"):
            (folder / name / file.name).write_bytes(file.read_bytes())
    return folder


def asked(command: str, folder: Path, text: Path, out: Path) -> list[object]:
    calibration = ("--calibration", text, "--calibration-window", 16, "--calibration-batch", 1)
    given: dict[str, list[object]] = {
        "evaluate": ["evaluate", folder, "--data", text, "--window", 16],
        "calibrate": ["convert", folder, out, "--kv-heads", 2, *calibration],
        "plan": ["plan", folder, "-o", out, "--kv-budget", "50%", *calibration],
        "uptrain": ["uptrain", folder, "--data", text, "--steps", 1, "--window", 16, "-o", out],
        "gguf": ["export", folder, out.with_suffix(".gguf"), "--to", "gguf", "--no-check"],
        "bench": ["bench", "decode", folder, "--prompt", 4, "--new", 2, "--batch", 1],
        "convert": ["convert", folder, out, "--kv-heads", 2, "--method", "mean"],
        "hf": ["export", folder, out, "--to", "hf"],
        "vllm": ["export", folder, out, "--to", "vllm"],
    }
    return given[command]


@pytest.mark.parametrize("command", ["evaluate", "calibrate", "plan", "uptrain", "gguf", "bench"])
def test_what_needs_a_head_refuses_a_model_without_one(command: str, bare: Path, tmp_path: Path) -> None:
    message = refused(*asked(command, bare / "bare", bare / "held-out.txt", tmp_path / "out"))
    assert "LlamaModel" in message
    assert "LlamaForCausalLM" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "uptrain", "gguf"])
def test_a_classifier_is_no_language_model(command: str, bare: Path, tmp_path: Path) -> None:
    message = refused(*asked(command, bare / "classifier", bare / "held-out.txt", tmp_path / "out"))
    assert "LlamaForSequenceClassification" in message
    assert "no language-modelling head" in message


@pytest.mark.parametrize("command", ["convert", "hf", "vllm"])
def test_what_needs_no_head_takes_both(command: str, bare: Path, tmp_path: Path) -> None:
    for name in ("bare", "classifier"):
        status, _, errors = run(*asked(command, bare / name, bare / "held-out.txt", tmp_path / name))
        assert status == 0, errors
        _, report = transformers.AutoModel.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not report["missing_keys"]


def test_an_export_of_hidden_states_that_differ_is_refused(
    bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control: without a head the comparison still compares something."""
    from regroup.exports import run as exports

    given = exports.folder_logits
    results: list[torch.Tensor] = []

    def spoilt(*args: Any, **kwargs: Any) -> torch.Tensor:
        results.append(given(*args, **kwargs))
        return results[-1] + (len(results) - 1)

    monkeypatch.setattr(exports, "folder_logits", spoilt)
    assert "output differs" in refused("export", bare / "bare", tmp_path / "out", "--to", "hf")
    assert results[0].shape[-1] == 48


def test_the_remedy_for_a_tied_base_model_works(saved: Saved, tmp_path: Path) -> None:
    """BART was published as its base model."""
    folder = tmp_path / "in"
    tiny_bart: Any = tiny.build("bart")
    tiny_bart.model.save_pretrained(folder)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("a b\tb a\n" * 8)
    for file in runs.pair(tmp_path / "runs")[1].glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    again = copy(folder, tmp_path / "again")
    assert '["BartForConditionalGeneration"]' in refused("evaluate", folder, "--data", pairs)
    edit_json(again / "config.json", architectures=["BartForConditionalGeneration"])
    assert run("evaluate", again, "--data", pairs)[0] == 0
