"""The measurements of real models: texts that do not overlap, paired errors, steps done once, and the tables."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from recipes.real import __main__ as program
from recipes.real import measure, paired, parents, running, steps, summary, tables, texts
from recipes.real.running import Kept, Usage
from recipes.real.targets import TARGETS, Shape
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import runs
from regroup.cli import app
from regroup.data import causal_batches, read_texts
from regroup.errors import RegroupError
from regroup.evaluation import score
from regroup.files import sha256_of

SENTENCE = "Number {} is a paragraph of its own, which is long enough that no two of them are the same by chance."
TOOK = {"seconds": 60.0, "cpu_seconds": 90.0, "peak_memory_bytes": 10**9, "resumed": False}


def passage(*numbers: int) -> str:
    return "\n\n".join(SENTENCE.format(number) for number in numbers)


def words(text: str) -> int:
    return len(text.split())


def test_parts_get_their_tokens_and_share_no_paragraph() -> None:
    cut = [passage(0), passage(1, 2), passage(2, 3), passage(4), passage(5).upper(), passage(6)]
    sizes = {"calibration": 2 * words(passage(0)), "train": words(passage(0))}
    divided, dropped = texts.divide(cut, sizes, texts.paragraphs(passage(0, 9)), words)
    # 0 is held out; 1 and 2 fill the first part; 2 and 3 share a paragraph with it.
    assert divided == {"calibration": [cut[1]], "train": [cut[3]]}
    assert dropped == 2
    # Without evaluation text there is nothing to leave out before the first part.
    assert texts.divide(cut, sizes, (), words)[0]["calibration"] == cut[:2]
    # Neither capitals nor line breaks make a paragraph another one.
    held = texts.paragraphs(passage(5).replace(" ", "\n"))
    assert texts.divide(cut[4:], {"train": 1}, held, words) == ({"train": [cut[5]]}, 1)
    with pytest.raises(RegroupError, match="too little given text"):
        texts.divide(cut, {"train": 10**6}, (), words)


def test_long_documents_are_cut_between_paragraphs() -> None:
    document = passage(*range(300))
    pieces = list(texts.passages(document))
    assert len(pieces) > 3
    assert all(len(piece) >= texts.PASSAGE for piece in pieces)
    assert document.startswith("".join(pieces).strip())
    assert list(texts.passages(passage(1, 2))) == [passage(1, 2)]


def test_prepared_texts_are_named_by_their_content(tmp_path: Path) -> None:
    given, held = tmp_path / "given.txt", tmp_path / "held.txt.gz.txt"
    given.write_text(passage(*range(2000)))
    held.write_text(passage(*range(5000, 5100)))
    sizes = {"tuning": 100, "calibration": 3000, "train": 3000}
    found = texts.prepare(str(given), [str(held)], tmp_path / "texts", sizes, words)
    assert found.facts["given"] == {"name": "given.txt", "sha256": sha256_of(given)}
    uses = [found.tuning, found.calibration, found.train, *found.held_out.values()]
    kept = [{key for text in read_texts(use) for key in texts.paragraphs(text)} for use in uses]
    assert all(kept)
    assert len(set().union(*kept)) == sum(map(len, kept))
    # The same request reads nothing again; another one does.
    given.unlink()
    assert texts.prepare(str(given), [str(held)], tmp_path / "texts", sizes, words) == found
    with pytest.raises(RegroupError):
        texts.prepare(str(given), [str(held)], tmp_path / "texts", sizes | {"train": 10}, words)
    with pytest.raises(RegroupError, match="same name"):
        texts.prepare("a/x.txt", ["b/x.txt", "c/x.jsonl.gz"], tmp_path / "texts", sizes, words)


def windows(nats: Sequence[float], original: Sequence[float] = (3.0, 1.0, 2.0), tokens: int = 10) -> list[dict]:
    rows = zip(nats, original, strict=True)
    return [{"tokens": tokens, "nats": a, "original_nats": b, "kl": 0.5, "top1": 0.25} for a, b in rows]


def test_errors_are_of_differences_and_not_of_losses() -> None:
    one, other = windows((4.0, 2.1, 3.2)), windows((3.5, 1.6, 2.7))
    value, error = paired.difference([one], [other])
    assert (value, error) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    # Unpaired, what makes windows hard would be taken for uncertainty.
    assert paired.mean_and_error([window["nats"] for window in one], [10] * 3)[1] > 0.4
    # Windows of equal length: the ordinary standard error.
    values = [1.0, 1.5, 4.0]
    assert paired.mean_and_error(values, [7] * 3)[1] == pytest.approx(stdev(values) / math.sqrt(3))
    assert math.isnan(paired.mean_and_error([1.0], [7])[1])
    # Seeds are averaged before windows are compared.
    assert paired.difference([one, other], [other])[0] == pytest.approx(0.25)


def test_single_windows_come_to_what_evaluate_says(tmp_path: Path) -> None:
    original, child = runs.pair(tmp_path)
    models = [AutoModelForCausalLM.from_pretrained(original).eval(), measure.load_for_scoring(child, "float32", "cpu")]
    ids = torch.randint(3, 60, (5, 24), generator=torch.Generator().manual_seed(0))
    whole = score(models[1], causal_batches(ids, 5), teacher=models[0])
    found = [measure.of_window(models[1], models[0], row) for row in ids.split(1)]
    value, error = paired.mean_and_error(paired.excess(found), [window["tokens"] for window in found])
    assert value == pytest.approx(whole.nats_per_token - (whole.teacher_nats_per_token or 0), abs=1e-5)
    assert error == pytest.approx(whole.excess_standard_error, rel=1e-3)
    assert paired.mean_of(found, "kl") == pytest.approx(whole.kl_nats_per_token, rel=1e-4)
    assert paired.mean_of(found, "top1") == pytest.approx(whole.top1_agreement)


def test_a_kv_head_for_each_query_head_is_the_same_function(tmp_path: Path) -> None:
    _, plain = runs.pair(tmp_path)
    config = json.loads((plain / "config.json").read_text())
    assert config["num_key_value_heads"] < config["num_attention_heads"]
    rebuilt = parents._rebuilt(plain, tmp_path / "rebuilt")
    ids = torch.arange(3, 30)[None]
    models = [AutoModelForCausalLM.from_pretrained(folder).eval() for folder in (plain, rebuilt)]
    assert models[1].config.num_key_value_heads == config["num_attention_heads"]
    logits = [model(ids).logits for model in models]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    # Its heads are not where they were: neighbours do not belong together.
    with torch.no_grad():
        weight = models[1].model.layers[0].self_attn.k_proj.weight
        weight.copy_(weight.roll(weight.shape[0] // config["num_attention_heads"], 0))
    assert (models[1](ids).logits - logits[0]).abs().max() > 1e-3


def test_what_cannot_be_had_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(RegroupError, match="not given"):
        parents.original_model("stories", None, tmp_path, lambda source, folder: None)
    (tmp_path / "model.bin").write_bytes(b"no model")
    with pytest.raises(RegroupError, match="no model"):
        parents.original_model("smollm2", tmp_path / "model.bin", tmp_path, lambda source, folder: None)


def test_a_command_is_done_once_and_again_where_its_result_is_gone(tmp_path: Path) -> None:
    made, done, fail = tmp_path / "made", [], [True]

    def runner(command: Sequence[str], log: Path) -> Usage:
        done.append(list(command))
        if fail:
            raise RegroupError("a step failed")
        made.touch()
        return Usage(1.0, 2.0, 3)

    kept = Kept(tmp_path / "kept", runner, lambda line: None)
    with pytest.raises(RegroupError):
        kept.command("a", ["x"], made)
    fail.clear()
    # Its time is that of the second half alone.
    assert kept.command("a", ["x"], made)["resumed"] is True
    assert len(done) == 2
    kept.command("a", ["x"], made)
    assert len(done) == 2
    made.unlink()
    assert kept.command("a", ["x"], made)["resumed"] is False
    assert len(done) == 3


def test_a_process_is_measured_and_its_failure_told(tmp_path: Path) -> None:
    used = running.in_a_process(["timeit", "-n", "1", "-r", "1", "b'x' * 50_000_000"], tmp_path / "log")
    assert used.seconds > 0
    assert used.peak_memory_bytes > 50_000_000
    with pytest.raises(RegroupError, match="No module named"):
        running.in_a_process(["there_is_no_such_module"], tmp_path / "log")


def result(way: str, tokens: int, nats: Sequence[float], seed: int = 0) -> dict[str, Any]:
    return {
        "shape": "kv-1",
        "way": way,
        "tokens": tokens,
        "seed": seed,
        "took": {"convert": TOOK | {"resumed": bool(seed)}},
        "measured": {"texts": {"books": windows(nats)}, "samples": [f"{way} | \n`said`"]},
    }


def a_record(*results: dict[str, Any]) -> dict[str, Any]:
    target = replace(TARGETS["stories"], shapes=(Shape("kv-1", 1),), prompts=("Once",), tokens=(100,))
    original = {"measured": {"texts": {"books": windows((3.0, 1.0, 2.0))}, "samples": ["she said"]}}
    return {
        "date": "2026-11-30T00:00:00Z",
        "machine": {"cores": 2, "processor": "some"},
        "configuration": {
            "original": target.title,
            "shapes": [{"name": "kv-1", "title": target.shapes[0].title}],
            "windows": 3,
            "window": 256,
            "document_starts": False,
            "calibration_tokens": 100,
            "texts": {"given": {"name": "books.txt"}},
        },
        "results": summary.summarise(target, original, results),
    }


def test_rows_are_compared_with_the_papers_at_the_same_tokens() -> None:
    own = [result("own", 0, (4.0, 2.0, 3.0)), result("own", 0, (4.5, 2.5, 3.5), seed=1)]
    found = a_record(
        result("distilled-own", 100, (3.2, 1.2, 2.2)),
        result("mean", 0, (5.0, 3.0, 4.0)),
        *reversed(own),
        result("paper", 100, (3.8, 1.8, 2.8)),
    )["results"]
    assert found["original"]["books"]["nats_per_token"] == 2.0
    assert [(row["way"], row["tokens"]) for row in found["rows"]] == [
        ("mean", 0),
        ("own", 0),
        ("paper", 100),
        ("distilled-own", 100),
    ]
    mean, own_row, paper, ours = (row["texts"]["books"] for row in found["rows"])
    assert "against" not in mean
    assert "against" not in paper
    assert own_row["excess_nats_per_token"] == pytest.approx(1.25)
    assert own_row["excess_by_seed"] == pytest.approx([1.0, 1.5])
    assert own_row["against"]["way"] == "mean"
    assert own_row["against"]["share_of_its_excess"] == pytest.approx(1.25 / 2)
    assert ours["against"] == {
        "way": "paper",
        "difference": pytest.approx(-0.6),
        "standard_error": pytest.approx(0.0, abs=1e-9),
        "share_of_its_excess": pytest.approx(0.25),
    }
    # An interrupted run's time is not known.
    assert found["rows"][1]["took"]["convert"]["seconds"] == 60.0
    assert summary.took([own[1]])["convert"]["seconds"] is None


def test_tables_hold_what_was_measured_and_nothing_else() -> None:
    page = "\n".join(tables.sections(a_record(result("mean", 0, (5.0, 3.0, 4.0)))))
    assert "| `mean` (the paper's) | 0 | +2.000 ± 0.000 | – | 0.500 | 25.0 | 1 |" in page
    assert "distilled" not in page
    assert "| original model |  | `she said` |" in page
    assert r"| `` mean ¦ \n`said` `` |" in page
    assert "###" not in "\n".join(tables.sections(a_record()))


def here(command: Sequence[str], log: Path) -> Usage:
    """Steps in this process: a start of Python takes longer than any of them."""
    module, *arguments = command
    if module == "regroup.cli":
        done = CliRunner().invoke(app, arguments)
    else:
        import typer

        measuring = typer.Typer()
        measuring.command()(measure.main)
        done = CliRunner().invoke(measuring, arguments)
    assert done.exit_code == 0, (command, done.output, done.exception)
    return Usage(1.0, 1.0, 1)


def small(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments of a run in next to no time: model, texts, and numbers."""
    original, _ = runs.pair(folder)
    for name, start in (("given", 0), ("held", 10**6)):
        lines = (json.dumps({"text": passage(*range(n, n + 3))}) for n in range(start, start + 900, 3))
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    target = replace(TARGETS["stories"].quick(), window=32, training_window=32, calibration_window=32)
    target = replace(target, shapes=(Shape("kv-1", 1), Shape("half", kv_budget="50%")), tokens=(256,))
    monkeypatch.setattr(steps, "best_rate", lambda rates, loss: min((rates[0], 2 * rates[0]), key=loss))
    return {
        "target": target,
        "work": folder / "work",
        "model": original,
        "text": str(folder / "given.jsonl"),
        "held_out": [str(folder / "held.jsonl")],
        "choose_at": 256,
        "seeds": 1,
    }


def never(command: Sequence[str], log: Path) -> Usage:
    raise AssertionError(command)


def named(found: dict[str, Any] | None) -> list[tuple[str, str, int]]:
    assert found is not None
    return [(row["shape"], row["way"], row["tokens"]) for row in found["results"]["rows"]]


def test_steps_on_a_small_model_are_done_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small(tmp_path, monkeypatch)
    first = program.run(**given, only=["original", "kv-1-mean-s0", "kv-1-distilled-own-*"], runner=here)
    assert named(first) == [("kv-1", "mean", 0), ("kv-1", "distilled-own", 256)]
    assert str(tmp_path) not in json.dumps(first)
    again = program.run(**given, only=["original", "kv-1-mean-s0", "kv-1-distilled-own-*"], runner=never)
    assert first is not None
    assert again is not None
    assert again["results"] == first["results"]
    excess = [row["texts"][next(iter(row["texts"]))]["excess_nats_per_token"] for row in first["results"]["rows"]]
    _, _, whole, *lines = [line.split(" | ") for line in tables.summary(first)]
    assert whole[0] == "| original model: nats per token"
    assert [line[1] for line in lines] == ["", "256"]
    assert [line[2].split(" ± ")[0] for line in lines] == [f"{value:+.2f}" for value in excess]
    with pytest.raises(RegroupError, match="no step is called so"):
        program.run(**given, only=["kv-7"], runner=never)


@pytest.mark.slow
def test_all_steps_on_a_small_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small(tmp_path, monkeypatch)
    found = program.run(**given, only=["*"], runner=here)
    assert found is not None
    assert named(found) == summary.order(given["target"])
    for row in found["results"]["rows"]:
        (held,) = row["texts"].values()
        assert held["kl_nats_per_token"] > 0
        assert (row["rate"] is None) == (row["way"] != "paper")
    assert {"plan", "convert"} == found["results"]["rows"][-4]["took"].keys()
    assert "\n".join(tables.section(found)).count("### ") == 2
