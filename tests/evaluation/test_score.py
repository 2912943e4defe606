"""Loss, KL and agreement against a loop over single tokens in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import regroup
import texts
import tiny
from helpers import copy, refused, run
from regroup import RegroupError
from regroup.evaluation import Batch, causal_batches, pair_batches, score
from regroup.evaluation.run import evaluate
from regroup.record import PACKAGES, write_record

Saved = Callable[[str], Path]
Converted = Callable[[str, str], Path]


def brute_force(model: Any, teacher: Any, windows: Tensor) -> dict[str, float]:
    """Every figure, one row and one token at a time."""
    losses, teacher_losses, divergences, agreed, rows, theirs_of = [], [], [], 0, [], []
    for window in windows:
        with torch.no_grad():
            ours, theirs = (m(input_ids=window[None]).logits[0].double().log_softmax(-1) for m in (model, teacher))
        row = []
        for place in range(len(window) - 1):
            row.append(-float(ours[place, window[place + 1]]))
            teacher_losses.append(-float(theirs[place, window[place + 1]]))
            p, q = theirs[place].exp(), ours[place]
            divergences.append(sum(float(p[i] * (theirs[place, i] - q[i])) for i in range(len(p))))
            agreed += int(ours[place].argmax() == theirs[place].argmax())
        losses += row
        rows.append(sum(row) / len(row))
        theirs_of.append(sum(teacher_losses[-len(row) :]) / len(row))
    mean = sum(losses) / len(losses)

    def error(values: list[float]) -> float:
        middle = sum(values) / len(values)
        return math.sqrt(sum((x - middle) ** 2 for x in values) / (len(values) - 1) / len(values))

    return {
        "nats_per_token": mean,
        "standard_error": error(rows),
        "teacher_standard_error": error(theirs_of),
        "excess_standard_error": error([mine - other for mine, other in zip(rows, theirs_of, strict=True)]),
        "teacher_nats_per_token": sum(teacher_losses) / len(losses),
        "kl_nats_per_token": sum(divergences) / len(losses),
        "top1_agreement": agreed / len(losses),
    }


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_decoder_against_a_loop(batch_size: int, saved: Saved, converted: Converted) -> None:
    original, grouped = regroup.load(saved("llama")), regroup.load(converted("llama", "some"))
    windows = tiny.inputs("llama", 7, 9)["input_ids"]
    seen: list[int] = []
    result = score(grouped, causal_batches(windows, batch_size), teacher=original, progress=seen.append)
    assert (result.tokens, sum(seen)) == (7 * 8, 7)
    for name, value in brute_force(grouped, original, windows).items():
        assert getattr(result, name) == pytest.approx(value, rel=1e-5, abs=1e-6), name
    assert result.perplexity == pytest.approx(math.exp(result.nats_per_token))
    assert result.bits_per_byte(100) == pytest.approx(result.nats_per_token * 56 / math.log(2) / 100)
    assert result.kl_nats_per_token is not None
    assert result.kl_nats_per_token > 0.01
    itself = score(original, causal_batches(windows, batch_size), teacher=original)
    assert itself.kl_nats_per_token == pytest.approx(0, abs=1e-9)
    assert itself.top1_agreement == 1
    alone = score(grouped, causal_batches(windows, batch_size))
    assert alone.nats_per_token == result.nats_per_token
    assert alone.kl_nats_per_token is None


def test_a_uniform_model_is_known_exactly(saved: Saved) -> None:
    model: Any = regroup.load(saved("llama"))
    torch.nn.init.zeros_(model.lm_head.weight)
    result = score(model, causal_batches(tiny.inputs("llama", 3, 5)["input_ids"], 2))
    assert result.nats_per_token == pytest.approx(math.log(tiny.VOCAB_SIZE), rel=1e-6)
    assert result.perplexity == pytest.approx(tiny.VOCAB_SIZE, rel=1e-5)
    assert result.standard_error == pytest.approx(0, abs=1e-6)
    one = score(model, causal_batches(tiny.inputs("llama", 1, 5)["input_ids"], 2))
    assert math.isnan(one.standard_error)


PAIRS = [("the cat sat", "mat"), ("hat", "the mat is flat"), ("cats or cats or cats", "the"), ("on", "cat; mat")]


@pytest.mark.parametrize("name", ["bart", "t5"])
def test_padded_pairs_equal_single_rows(name: str, saved: Saved, converted: Converted) -> None:
    original, grouped = regroup.load(saved(name)), regroup.load(converted(name, "some"))
    tokenizer = texts.tokenizer()
    start = int(grouped.config.decoder_start_token_id)
    together = score(grouped, pair_batches(PAIRS, tokenizer, batch_size=4, start_token=start), teacher=original)
    loss, count = 0.0, 0
    for source, target in PAIRS:
        ids, wanted = (tokenizer(text)["input_ids"] for text in (source, target))
        with torch.no_grad():
            model: Any = grouped
            given = {"input_ids": torch.tensor([ids]), "decoder_input_ids": torch.tensor([[start, *wanted[:-1]]])}
            logp = model(**given).logits[0].double().log_softmax(-1)
        loss -= sum(float(logp[place, token]) for place, token in enumerate(wanted))
        count += len(wanted)
    assert together.tokens == count
    assert together.nats_per_token == pytest.approx(loss / count, rel=1e-5)
    single = score(grouped, pair_batches(PAIRS, tokenizer, batch_size=1, start_token=start), teacher=original)
    for field in ("nats_per_token", "kl_nats_per_token", "top1_agreement", "standard_error"):
        assert getattr(single, field) == pytest.approx(getattr(together, field), rel=1e-4)
    batches = list(pair_batches(PAIRS, tokenizer, batch_size=4, start_token=start))
    unmasked = [
        Batch(b.inputs | {"attention_mask": torch.ones_like(b.inputs["input_ids"])}, b.targets) for b in batches
    ]
    assert score(grouped, unmasked).nats_per_token != pytest.approx(loss / count, rel=1e-4)  # the mask matters


def test_long_pairs_are_cut_and_empty_ones_refused() -> None:
    tokenizer = texts.tokenizer()
    (batch,) = pair_batches([("cat " * 50, "mat " * 50)], tokenizer, batch_size=1, start_token=2, max_length=5)
    assert batch.inputs["input_ids"].shape == batch.targets.shape == (1, 5)
    with pytest.raises(RegroupError, match="empty side"):
        list(pair_batches([("", "x")], tokenizer, batch_size=1, start_token=2))


def test_other_vocabularies_are_refused(saved: Saved, tmp_path: Path) -> None:
    original = regroup.load(saved("llama"))
    other: Any = tiny.build("llama")
    other.resize_token_embeddings(tiny.VOCAB_SIZE + 4)
    windows = tiny.inputs("llama", 2, 5)["input_ids"]
    with pytest.raises(RegroupError, match=r"another vocabulary[\s\S]*96[\s\S]*100"):
        score(original, causal_batches(windows, 2), teacher=other)
    windows[0, 1] = tiny.VOCAB_SIZE
    for row in (windows, windows.roll(3, 1)):
        with pytest.raises(RegroupError, match=r"outside the model's vocabulary[\s\S]*ids below 96[\s\S]*got: +96"):
            score(original, causal_batches(row, 2))
    score(other, causal_batches(windows, 2))
    target_only = Batch({"input_ids": windows[1:]}, torch.full_like(windows[1:], 96))
    with pytest.raises(RegroupError, match="outside the model"):
        score(original, [target_only])
    with pytest.raises(RegroupError, match="nothing to evaluate"):
        score(original, [])


@pytest.fixture
def folders(saved: Saved, converted: Converted, tmp_path: Path) -> tuple[Path, Path, Path]:
    """An original model and a converted model with a tokenizer, and a text."""
    original, grouped = copy(saved("llama"), tmp_path / "parent"), copy(converted("llama", "mixed"), tmp_path / "child")
    for folder in (original, grouped):
        texts.tokenizer().save_pretrained(folder)
    (tmp_path / "held-out.txt").write_text("the cat sat on the mat; the hat is flat. " * 20)
    return original, grouped, tmp_path / "held-out.txt"


def test_a_record_says_what_was_done(folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, grouped, data = folders
    output = tmp_path / "new" / "record.json"
    status, out, message = run(
        *("evaluate", grouped, "--data", data, "--teacher", original, "--window", 16, "--windows", 5, "--batch", 2),
        *("--dtype", "float32", "--device", "cpu", "-o", output, "--json"),
    )
    assert status == 0, message
    record = json.loads(out)
    assert record == json.loads(output.read_text())
    assert set(record["versions"]) == {*PACKAGES, "python"}
    assert {"processor", "cores", "threads", "system"} <= set(record["machine"])
    assert record["configuration"] == {
        "model": str(grouped),
        "teacher": str(original),
        "data": "held-out.txt",
        "window": 16,
        "windows": 5,
        "document_starts": False,
        "batch_size": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    results = record["results"]
    assert (results["rows"], results["tokens"]) == (5, 75)
    assert results["excess_nats_per_token"] == results["nats_per_token"] - results["teacher_nats_per_token"]
    tokenizer = texts.tokenizer()
    ids = tokenizer(data.read_text(), add_special_tokens=False)["input_ids"][: 5 * 15]
    nbytes = len(tokenizer.decode(ids).encode())
    bits = results["nats_per_token"] * 75 / math.log(2) / nbytes
    assert results["bits_per_byte"] == pytest.approx(bits)
    windows = torch.tensor([[1, *ids[i : i + 15]] for i in range(0, 75, 15)])
    expected = brute_force(regroup.load(grouped), regroup.load(original), windows)
    for name, value in expected.items():
        assert results[name] == pytest.approx(value, rel=1e-5)
    status, out, _ = run("evaluate", grouped, "--data", data, "--window", 16, "--windows", 5, "--device", "cpu")
    assert status == 0
    assert f"{results['nats_per_token']:.4f}" in out


def test_a_record_of_one_window_is_valid_json(folders: tuple[Path, Path, Path]) -> None:
    original, _, data = folders
    status, out, _ = run("evaluate", original, "--data", data, "--window", 16, "--windows", 1, "--json")
    assert status == 0
    assert json.loads(out, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))["results"]
    assert json.loads(out)["results"]["standard_error"] is None


def test_a_record_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegroupError, match="cannot be written"):
        write_record(tmp_path / "file" / "record.json", {"a": 1})


def test_an_encoder_decoder_from_disk(saved: Saved, converted: Converted, tmp_path: Path) -> None:
    grouped = copy(converted("t5", "some"), tmp_path / "child")
    texts.tokenizer().save_pretrained(grouped)
    data = tmp_path / "pairs.tsv"
    data.write_text("\n".join("\t".join(pair) for pair in PAIRS))
    record = evaluate(str(grouped), data, teacher=str(saved("t5")), windows=3, batch_size=2, device="cpu")
    assert record["results"]["rows"] == 3
    assert "bits_per_byte" not in record["results"]
    expected = score(
        regroup.load(grouped), pair_batches(PAIRS[:3], texts.tokenizer(), batch_size=2, start_token=0)
    ).nats_per_token
    assert record["results"]["nats_per_token"] == pytest.approx(expected)


def test_what_cannot_be_evaluated(saved: Saved, folders: tuple[Path, Path, Path], tmp_path: Path) -> None:
    original, _, data = folders
    whisper = copy(saved("whisper"), tmp_path / "whisper")
    texts.tokenizer().save_pretrained(whisper)
    cases = [
        ((saved("llama"), "--data", data), "no tokenizer"),
        ((whisper, "--data", data), "cannot be evaluated on text"),
        ((original, "--data", tmp_path / "absent.txt"), "cannot be read"),
        ((original, "--data", data, "--dtype", "int4"), "dtype is not known"),
        ((original, "--data", data, "--window", 9999), "longer than the model's positions"),
        ((tmp_path / "absent", "--data", data), "does not exist"),
        ((original, "--data", data, "--teacher", tmp_path / "absent"), "does not exist"),
    ]
    for arguments, words in cases:
        assert words in refused("evaluate", *arguments)
