"""Calibration text: where its windows begin, which are held out, and what is refused before it is tokenised."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import texts
from helpers import config_of, copy, refused
from regroup import RegroupError
from regroup.calibration import text as text_module
from regroup.calibration.text import calibration_batches
from regroup.data import document_windows, token_windows
from regroup.plans import CalibrationText

Saved = Callable[[str], Path]
DECODER = {"model_type": "llama"}
DOCUMENTS = [f"{number} cats sat on the mat; " * 12 for number in range(4)]


@pytest.fixture(autouse=True)
def _tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module, "load_tokenizer", lambda _: texts.tokenizer())


def lines(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path


def rows(text: CalibrationText) -> list[list[int]]:
    batches = calibration_batches(text, Path("parent"), DECODER)
    return torch.cat([batch["input_ids"] for batch in batches]).tolist()


def refusal(text: CalibrationText, config: dict[str, Any]) -> dict[str, Any]:
    """The message and the details of a refusal."""
    with pytest.raises(RegroupError) as error:
        calibration_batches(text, Path("parent"), config)
    return {"what": error.value.what, **error.value.details}


def test_document_starts_need_several_documents(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("\n".join(DOCUMENTS))
    one = lines(tmp_path / "a.jsonl", [DOCUMENTS[0], " ", ""])
    for file in (plain, one):
        text = CalibrationText(file, tokens=120, window=12, batch=2)
        assert rows(text)
        said = refusal(replace(text, document_starts=True), DECODER)
        assert said["what"] == "there are no document starts to begin windows at"
        assert (said["file"], said["expected"], said["got"]) == (file, "several documents", "one")
        assert "JSON lines" in said["remedy"]
    # A folder of text files holds as many documents.
    folder = tmp_path / "folder"
    folder.mkdir()
    for number, document in enumerate(DOCUMENTS[:2]):
        (folder / f"{number}.txt").write_text(document)
    assert rows(CalibrationText(folder, tokens=48, window=12, batch=2, document_starts=True))


def test_windows_from_document_starts_are_shuffled(tmp_path: Path) -> None:
    """All windows that ``document_windows`` cuts, in an order that the seed alone decides."""
    text = CalibrationText(lines(tmp_path / "a.jsonl", DOCUMENTS), 24 * 12, 12, 2, document_starts=True)
    cut = document_windows(DOCUMENTS, texts.tokenizer(), length=12, limit=24).tolist()
    assert len(cut) == 24
    found = rows(text)
    assert sorted(found) == sorted(cut)
    assert found != cut
    assert rows(text) == found
    assert rows(replace(text, seed=1)) != found
    # A document's first windows are not all in front, where none would be held out.
    assert {cut.index(row) for row in found[:4]} != {0, 1, 2, 3}


def test_joined_windows_keep_their_order(tmp_path: Path) -> None:
    text = CalibrationText(lines(tmp_path / "a.jsonl", DOCUMENTS), 96, 12, 2)
    assert rows(text) == token_windows(DOCUMENTS, texts.tokenizer(), length=12, limit=8)[0].tolist()


@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_windows_longer_than_the_positions_are_refused_first(
    name: str, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("tokenised before it was checked")

    monkeypatch.setattr(text_module, "load_tokenizer", never)
    monkeypatch.setattr(text_module, "read_texts", never)
    said = refusal(CalibrationText(tmp_path / "a.txt", window=65), config_of(saved(name)))
    assert said["what"] == "the windows are longer than the model's positions"
    assert (said["expected"], said["got"]) == ("at most 64 tokens", 65)
    assert said["remedy"] == "pass --calibration-window 64"


def test_a_speech_model_is_refused(saved: Saved, tmp_path: Path) -> None:
    whisper = copy(saved("whisper"), tmp_path / "whisper")
    texts.tokenizer().save_pretrained(whisper)
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("the cat\tthe mat\n" * 40)
    message = refused("convert", whisper, tmp_path / "child", "--kv-heads", 2, "--calibration", pairs)
    assert "speech models cannot be calibrated on text" in message
    assert "leave --calibration out" in message
    assert not (tmp_path / "child").exists()


def test_messages_are_of_calibration(tmp_path: Path) -> None:
    """They name the file and the options of calibration, which are not those of evaluation."""
    plain = tmp_path / "a.txt"
    plain.write_text("the cat")
    several = lines(tmp_path / "a.jsonl", ["the cat", "the mat"])
    for text in (CalibrationText(plain, window=60), CalibrationText(several, window=60, document_starts=True)):
        said = refusal(text, DECODER)
        assert said["file"] == text.data
        assert "a shorter --calibration-window" in said["remedy"]
    said = refusal(CalibrationText(lines(several, DOCUMENTS), tokens=24, window=12, batch=2), DECODER)
    assert said["what"] == "there is too little calibration text"
    assert "raise --calibration-tokens" in said["remedy"]
