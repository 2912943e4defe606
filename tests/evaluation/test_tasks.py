"""Tasks from end to end: answers against plain generate, resuming, likelihoods against brute force, bad files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runs
import texts
import tiny
from helpers import refused, run
from regroup.checkpoint import fingerprint
from regroup.errors import RegroupError
from regroup.evaluation.answers import evaluate_task
from regroup.evaluation.generate import answer, settings
from regroup.evaluation.outputs import read
from regroup.evaluation.prompts import decoder_ids, encode, last
from regroup.evaluation.task import Row, Task
from regroup.modeling import load, load_tokenizer

Saved = Callable[[str], Path]

# Unlike lengths, the empty-looking one and those that are not ASCII among them.
SOURCES = ["the cat sat on the mat", "a", "naïve café: 步步", "42 cats; 42 hats, the hat is flat", "the mat"]
# Sliding windows, ALiBi, absolute and rotary positions, both kinds of model.
FAMILIES = ["llama", "mistral", "gpt2", "opt", "gpt_neox", "bloom", "falcon_alibi", "gemma2", "t5", "bart", "m2m_100"]


def a_task(folder: Path, **changes: Any) -> Path:
    """A task's file with its rows next to it."""
    rows = changes.pop("rows", [{"source": source, "target": source[:5].strip()} for source in SOURCES])
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    path = folder / "task.yaml"
    path.write_text(json.dumps({"data": data.name, "max-new-tokens": 8} | changes), encoding="utf-8")
    return path


def checkpoint(saved: Saved, name: str, folder: Path) -> Path:
    """A family's checkpoint with a tokenizer."""
    target = folder / name
    target.mkdir()
    for file in saved(name).iterdir():
        (target / file.name).symlink_to(file)
    made = runs.t5_tokenizer() if name.startswith("t5") else texts.tokenizer()
    made.save_pretrained(target)
    return target


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_those_of_plain_generate_whatever_the_batch(name: str, saved: Saved, tmp_path: Path) -> None:
    folder = checkpoint(saved, name, tmp_path)
    model: Any = load(folder, dtype=torch.float32, progress=False).eval()
    tokenizer = load_tokenizer(folder)
    task = Task.load(a_task(tmp_path))
    prompts = encode(task.rows(), task, tokenizer, model)
    how = settings(model, tokenizer, task)
    together = answer(model, tokenizer, prompts, task, how)
    by_two = [row for first in (0, 2, 4) for row in answer(model, tokenizer, prompts[first : first + 2], task, how)]
    assert together == by_two
    for ids, found in zip(prompts, together, strict=True):
        made = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False, num_beams=1)[0].tolist()
        made = made[1:] if model.config.is_encoder_decoder else made[len(ids) :]
        end = made.index(2) if 2 in made else len(made)
        assert found == made[:end]
    # Negative control: another prompt has another answer, so equality says something.
    assert len({tuple(row) for row in together}) > 1 or name in ("t5", "bart", "m2m_100")


def test_padding_on_the_wrong_side_would_be_seen(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regroup.evaluation import generate

    folder = checkpoint(saved, "llama", tmp_path)
    model: Any = load(folder, dtype=torch.float32, progress=False).eval()
    tokenizer, task = load_tokenizer(folder), Task.load(a_task(tmp_path))
    prompts, how = encode(task.rows(), task, tokenizer, model), settings(model, tokenizer, task)
    right = answer(model, tokenizer, prompts, task, how)
    padded = generate.padded
    monkeypatch.setattr(generate, "padded", lambda rows, fill, left: padded(rows, fill, left=not left))
    assert answer(model, tokenizer, prompts, task, how) != right


def test_settings_of_the_checkpoint_do_not_leak_in(saved: Saved, tmp_path: Path) -> None:
    folder = checkpoint(saved, "llama", tmp_path)
    task = Task.load(a_task(tmp_path))
    plain = evaluate_task(str(folder), task, outputs=tmp_path / "plain.jsonl")
    own = {
        "do_sample": True,
        "temperature": 5.0,
        "top_k": 3,
        "repetition_penalty": 9.0,
        "num_beams": 4,
        "min_length": 7,
    }
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps(own | {"eos_token_id": 2, "pad_token_id": 0}))
    sampled = evaluate_task(str(folder), task, outputs=tmp_path / "own.jsonl")
    assert sampled["results"] == plain["results"]
    assert read(tmp_path / "own.jsonl")[1] == read(tmp_path / "plain.jsonl")[1]


def test_a_broken_run_resumes_and_gives_the_same(saved: Saved, tmp_path: Path) -> None:
    folder, task = checkpoint(saved, "llama", tmp_path), Task.load(a_task(tmp_path))
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    wanted = evaluate_task(str(folder), task, outputs=whole, batch_size=1)
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:3]) + lines[3][:10])  # killed in the middle of a line
    answered: list[int] = []
    found = evaluate_task(str(folder), task, outputs=part, batch_size=2, progress=lambda done, _: answered.append(done))
    assert answered == [2, 4, 5]
    assert read(part)[1] == read(whole)[1]
    assert found["results"] == wanted["results"]


def test_outputs_of_another_evaluation_are_refused(saved: Saved, tmp_path: Path) -> None:
    folder = checkpoint(saved, "llama", tmp_path)
    kept = tmp_path / "kept.jsonl"
    evaluate_task(str(folder), Task.load(a_task(tmp_path)), outputs=kept)
    before = kept.read_bytes()
    with pytest.raises(RegroupError, match="of another evaluation"):
        evaluate_task(str(folder), Task.load(a_task(tmp_path, **{"max-new-tokens": 3})), outputs=kept)
    with pytest.raises(RegroupError, match="of another evaluation"):
        evaluate_task(str(checkpoint(saved, "mistral", tmp_path)), Task.load(a_task(tmp_path)), outputs=kept)
    assert kept.read_bytes() == before


def test_answers_with_rare_separators_are_read_again(saved: Saved, tmp_path: Path) -> None:
    folder, kept = checkpoint(saved, "llama", tmp_path), tmp_path / "kept.jsonl"
    rows = [{"source": f"the{mark}cat", "target": f"m{mark}a"} for mark in "\u2028\u2029\u0085\x1c\x0b\r"]
    task = Task.load(a_task(tmp_path, rows=rows))
    found = evaluate_task(str(folder), task, outputs=kept)
    assert [row["prompt"] for _, row in sorted(read(kept)[1].items())] == [row["source"] for row in rows]
    again = evaluate_task(str(folder), task, outputs=kept, against=kept)["results"]
    assert again["metrics"]["f1"]["value"] == found["results"]["metrics"]["f1"]["value"]


def test_an_empty_file_takes_outputs(saved: Saved, tmp_path: Path) -> None:
    folder, kept = checkpoint(saved, "llama", tmp_path), tmp_path / "kept.jsonl"
    kept.touch()
    evaluate_task(str(folder), Task.load(a_task(tmp_path)), outputs=kept)
    assert len(read(kept)[1]) == len(SOURCES)


@pytest.mark.parametrize(
    "line",
    [
        "[" * 100_000,
        '{"row": 0}',
        '{"row": 1e400, "answer": "a", "tokens": 1}',
        '{"row": 0, "answer": 3, "tokens": 1}',
        '{"row": 0, "answer": "a", "tokens": "1"}',
        '{"row": 0, "log_likelihoods": ["a"]}',
        '{"row": 0, "log_likelihoods": [-1.0, -2.0]}',
    ],
)
def test_damaged_outputs_are_refused(line: str, tmp_path: Path) -> None:
    original, converted = runs.pair(tmp_path)
    task, kept = a_task(tmp_path, rows=[{"source": "the", "target": "cat"}]), tmp_path / "kept.jsonl"
    evaluate_task(str(original), Task.load(task), outputs=kept)
    head = kept.read_text().splitlines()[0]
    kept.write_text(f"{head}\n{line}\n")
    for message in (
        refused("evaluate", converted, "--task", task, "--against", kept),
        refused("evaluate", original, "--task", task, "--outputs", kept),
    ):
        assert "does not hold outputs" in message or "not one to its row" in message
        assert "kept.jsonl" in message
    assert kept.read_text() == f"{head}\n{line}\n"


def test_another_tensor_in_the_middle_is_another_model(tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    original, _ = runs.pair(tmp_path)
    task, kept = a_task(tmp_path), tmp_path / "kept.jsonl"
    weights = load_file(original / "model.safetensors")
    with safe_open(original / "model.safetensors", "pt") as file:
        names = list(file.keys())
    place = names.index("model.layers.1.self_attn.o_proj.weight")
    sizes = [weights[name].nbytes for name in names]
    assert min(sum(sizes[:place]), sum(sizes[place + 1 :])) > 10 * 4096  # far from both ends of the file
    before = fingerprint(original)
    assert fingerprint(original) == before
    evaluate_task(str(original), Task.load(task), outputs=kept)
    weights["model.layers.1.self_attn.o_proj.weight"] *= 2
    save_file(weights, original / "model.safetensors", {"format": "pt"})
    with pytest.raises(RegroupError, match="of another evaluation"):
        evaluate_task(str(original), Task.load(task), outputs=kept)


def test_what_is_read_is_not_written_over(tmp_path: Path) -> None:
    original, converted = runs.pair(tmp_path)
    task, rows, kept = a_task(tmp_path), tmp_path / "rows.jsonl", tmp_path / "kept.jsonl"
    evaluate_task(str(original), Task.load(task), outputs=kept)
    given = ("evaluate", converted, "--task", task, "--against", kept)
    before = [path.read_bytes() for path in (task, rows, kept)]
    (tmp_path / "link").symlink_to(kept)
    for more in (("-o", kept), ("-o", task), ("-o", rows), ("--outputs", rows), ("-o", tmp_path / "link")):
        assert "overwrite" in refused(*given, *more)
    assert "the record" in refused(*given, "-o", tmp_path / "x", "--outputs", tmp_path / "x")
    assert [path.read_bytes() for path in (task, rows, kept)] == before


def test_names_with_brackets_are_names(tmp_path: Path) -> None:
    original, _ = runs.pair(tmp_path)
    task, kept = a_task(tmp_path, name="[/b]"), tmp_path / "[b]kept.jsonl"
    evaluate_task(str(original), Task.load(task), outputs=kept)
    status, out, message = run("evaluate", original, "--task", task, "--against", kept)
    assert status == 0, message
    assert "[b]kept" in out


def test_tokens_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    original, _ = runs.pair(tmp_path)
    made = load_tokenizer(original)
    made.add_tokens([f"the{number}" for number in range(40)])
    made.save_pretrained(original)
    rows = [{"source": "the39", "target": "a", "choices": [" the38", " cat"], "answer": 1}]
    for more in ({}, {"choices": "choices"}):
        with pytest.raises(RegroupError, match="outside the model's vocabulary"):
            evaluate_task(str(original), Task.load(a_task(tmp_path, rows=rows, **more)))


def test_likelihoods_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    original, _ = runs.pair(tmp_path)
    weights = load_file(original / "model.safetensors")
    weights["model.norm.weight"].fill_(math.nan)
    save_file(weights, original / "model.safetensors", {"format": "pt"})
    task = a_task(tmp_path, rows=CHOICES, choices="choices")
    message = refused("evaluate", original, "--task", task, "-o", tmp_path / "record.json")
    assert "not numbers" in message
    assert not (tmp_path / "record.outputs.jsonl").exists()


CHOICES = [
    {"source": "the cat sat", "choices": [" on the mat", " hats"], "answer": 0},
    {"source": "42 ", "choices": ["cats", "the flat hat"], "answer": 1},
    {"source": "naïve", "choices": [" café", " 步", "; the"], "answer": 2},
]


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_likelihoods_are_those_of_single_tokens(name: str, saved: Saved, tmp_path: Path) -> None:
    folder = checkpoint(saved, name, tmp_path)
    task = Task.load(a_task(tmp_path, rows=CHOICES, choices="choices", metrics=["accuracy", "accuracy-by-length"]))
    kept = tmp_path / "kept.jsonl"
    found = evaluate_task(str(folder), task, outputs=kept, batch_size=2)["results"]["metrics"]
    model: Any = load(folder, dtype=torch.float32, progress=False).eval()
    tokenizer = load_tokenizer(folder)
    right = by_length = 0
    for number, row in enumerate(CHOICES):
        scores = [token_by_token(model, tokenizer, row["source"], choice) for choice in row["choices"]]
        assert read(kept)[1][number]["log_likelihoods"] == pytest.approx(scores, abs=1e-4)
        right += max(range(len(scores)), key=scores.__getitem__) == row["answer"]
        lengths = [score / len(choice) for score, choice in zip(scores, row["choices"], strict=True)]
        by_length += max(range(len(scores)), key=lengths.__getitem__) == row["answer"]
    assert found["accuracy"]["value"] == pytest.approx(right / 3)
    assert found["accuracy_by_length"]["value"] == pytest.approx(by_length / 3)


@torch.inference_mode()
def token_by_token(model: Any, tokenizer: Any, prompt: str, choice: str) -> float:
    """One forward pass a token, nothing padded."""
    total = 0.0
    if model.config.is_encoder_decoder:
        source = torch.tensor([tokenizer(prompt)["input_ids"]])
        before = [model.config.decoder_start_token_id]
        for token in tokenizer(choice)["input_ids"]:
            logits = model(input_ids=source, decoder_input_ids=torch.tensor([before])).logits[0, -1]
            total += float(logits.double().log_softmax(-1)[token])
            before.append(token)
        return total
    kept = prompt.rstrip()
    context = tokenizer(kept, add_special_tokens=False)["input_ids"]
    whole = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
    for place in range(len(context), len(whole)):
        logits = model(input_ids=torch.tensor([whole[:place]])).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[whole[place]])
    return total


@pytest.mark.slow  # the harness takes half a minute to import
def test_the_harness_agrees_with_our_own_likelihoods(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    from regroup.evaluation.harness import evaluate_harness

    _, converted = runs.pair(tmp_path, "gpt_neox")
    task = a_task(tmp_path, rows=CHOICES[:2] * 4, choices="choices", metrics=["accuracy", "accuracy-by-length"])
    ours = evaluate_task(str(converted), Task.load(task), dtype="float32")["results"]["metrics"]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "local.yaml").write_text(
        json.dumps(
            {
                "task": "regroup_local",
                "dataset_path": "json",
                "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
                "test_split": "test",
                "output_type": "multiple_choice",
                "doc_to_text": "{{source}}",
                "doc_to_choice": "{{choices}}",
                "doc_to_target": "{{answer}}",
                "target_delimiter": "",
                "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            }
        )
    )
    found = evaluate_harness(str(converted), ["regroup_local"], include=folder, dtype="float32")["results"]["tasks"]
    assert found["regroup_local"]["acc,none"] == pytest.approx(ours["accuracy"]["value"])
    assert found["regroup_local"]["acc_norm,none"] == pytest.approx(ours["accuracy_by_length"]["value"])
    with pytest.raises(RegroupError, match="no such task"):
        evaluate_harness(str(converted), ["nothing_of_the_kind"], include=folder)


def test_two_models_are_compared_row_by_row(tmp_path: Path) -> None:
    original, converted = runs.pair(tmp_path)
    task = a_task(tmp_path, metrics=["character-error-rate", "chrf"])
    status, _, message = run("evaluate", original, "--task", task, "-o", tmp_path / "parent.json")
    assert status == 0, message
    kept = tmp_path / "parent.outputs.jsonl"
    status, out, message = run("evaluate", converted, "--task", task, "--against", kept, "-o", tmp_path / "child.json")
    assert status == 0, message
    assert "minus" in out
    assert "chrf" in out
    records = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("parent", "child")]
    mine, other = (record["results"]["metrics"]["chrf"] for record in records)
    assert other["difference"]["value"] == pytest.approx(other["value"] - mine["value"])
    # Against itself nothing differs.
    status, _, _ = run("evaluate", original, "--task", task, "--against", kept, "-o", tmp_path / "same.json")
    same = json.loads((tmp_path / "same.json").read_text())["results"]["metrics"]["chrf"]["difference"]
    assert (same["value"], same["low"], same["high"], same["p"]) == (0.0, 0.0, 0.0, 1.0)
    kept.write_bytes(b"".join(kept.read_bytes().splitlines(keepends=True)[:-1]))
    assert "not complete" in refused("evaluate", converted, "--task", task, "--against", kept)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metrics": ["blue"]}, ("metrics", "bleu", "blue")),
        ({"metric": ["bleu"]}, ("metrics", "metric")),
        ({"max-new-tokens": 0}, ("max-new-tokens", "above 0")),
        ({"max-new-tokens": True}, ("max-new-tokens", "above 0")),
        ({"prompt": "no field"}, ("prompt", "braces")),
        ({"prompt": "{source!x"}, ("prompt", "format string")),
        ({"prompt": "{}"}, ("prompt", "names of fields")),
        ({"prompt": "{other}"}, ("line 1", "rows.jsonl", "other")),
        ({"target": "other"}, ("line 1", "other: a text")),
        ({"data": "none.jsonl"}, ("none.jsonl", "none there")),
        ({"rows": []}, ("no rows",)),
        ({"rows": [{"source": "a", "target": "b"}, {"source": "a", "target": ""}]}, ("line 2", "none of them empty")),
        ({"rows": [{"source": "a", "target": ["b", 3]}]}, ("line 1", "or several")),
        ({"rows": [3]}, ("line 1", "a JSON object")),
        ({"choices": "choices", "metrics": ["bleu"]}, ("metrics", "accuracy", "bleu")),
        ({"choices": "choices"}, ("line 1", "two texts or more")),
        ({"choices": "c", "rows": [{"source": "a", "c": ["x", "y"], "answer": 2}]}, ("line 1", "from 0 to 1", "2")),
        ({"source-language": "deu_Latn"}, ("source language", "knows none")),
        ({"rows": [{"source": None, "target": "b"}]}, ("line 1", "source: a text or a number", "None")),
        ({"rows": [{"source": ["a"], "target": "b"}]}, ("line 1", "source: a text or a number", "['a']")),
        ({"rows": [{"source": -1, "target": "b"}], "prompt": "{source:c}"}, ("line 1", "fit the prompt", "Overflow")),
        ({"rows": [{"source": "\ud800", "target": "b"}]}, ("line 1", "a JSON object", "surrogates")),
        ({"rows": [{"source": "a", "target": "\ud800"}]}, ("line 1", "a JSON object", "surrogates")),
        ({"data": "~nobody-of-that-name/rows.jsonl"}, ("data: a file's name", "~nobody")),
        ({"data": "rows\0.jsonl"}, ("data: a file's name", "null byte")),
        ({"max_new_tokens": 3}, ("max-new-tokens: one value", "max_new_tokens")),
        ({"max-new-tokens": tiny.MAX_POSITIONS}, ("longer than the model's positions", "max-source-tokens")),
    ],
)
def test_bad_tasks_are_refused(changes: dict[str, Any], words: tuple[str, ...], tmp_path: Path) -> None:
    original, _ = runs.pair(tmp_path)
    message = refused("evaluate", original, "--task", a_task(tmp_path, **changes), "-o", tmp_path / "record.json")
    for word in words:
        assert word in message
    assert not (tmp_path / "record.json").exists()
    assert not (tmp_path / "record.outputs.jsonl").exists()


@pytest.mark.parametrize("most", [1, 2, 5, 100])
def test_a_decoder_keeps_the_end_of_a_long_prompt(most: int) -> None:
    tokenizer = texts.tokenizer()
    whole = decoder_ids(texts.TEXT[:60], tokenizer)
    assert decoder_ids(texts.TEXT[:60], tokenizer, most) == whole[max(0, len(whole) - most) :]
    # With a beginning-of-sequence token, which stays.
    for count in (1, 2, 5):
        assert last([1], [7, 8, 9, 10], count) == [1, 7, 8, 9, 10][:1] + [7, 8, 9, 10][max(0, 4 - (count - 1)) :]


def test_options_of_other_ways_are_refused(tmp_path: Path) -> None:
    task = a_task(tmp_path)
    assert "one of --data, --task and --tasks" in refused("evaluate", tmp_path)
    assert "several things" in refused("evaluate", tmp_path, "--task", task, "--data", task)
    assert "only with --data" in refused("evaluate", tmp_path, "--task", task, "--teacher", tmp_path)
    assert "only with --tasks" in refused("evaluate", tmp_path, "--task", task, "--limit", 3)


def test_broken_yaml_and_half_rows(tmp_path: Path) -> None:
    path = tmp_path / "task.yaml"
    path.write_text("data: [")
    with pytest.raises(RegroupError, match="not valid YAML"):
        Task.load(path)
    path.write_text("just words")
    with pytest.raises(RegroupError, match="table of settings"):
        Task.load(path)
    path.write_text("[" * 100_000)
    with pytest.raises(RegroupError, match="not valid YAML"):
        Task.load(path)
    path.write_text("data: rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("[" * 100_000)
    with pytest.raises(RegroupError, match="line 1: maximum recursion"):
        Task.load(path).rows()
    path.write_text("data: rows.tsv")
    (tmp_path / "rows.tsv").write_text("word\tanswer\nword without a tab\n")
    with pytest.raises(RegroupError, match="line 2"):
        Task.load(path).rows()
    (tmp_path / "rows.tsv").write_text("word\tanswer\n")
    assert Task.load(path).rows() == [Row("word", ("answer",))]
    (tmp_path / "rows.tsv").write_bytes(b"\xff\xfe\t\n")
    with pytest.raises(RegroupError, match="not UTF-8"):
        Task.load(path).rows()


def test_stops_end_an_answer(tmp_path: Path) -> None:
    original, _ = runs.pair(tmp_path)
    kept = [tmp_path / "free.jsonl", tmp_path / "stopped.jsonl"]
    evaluate_task(str(original), Task.load(a_task(tmp_path)), outputs=kept[0])
    free = [row["answer"] for _, row in sorted(read(kept[0])[1].items())]
    stop = free[0][2:4]
    evaluate_task(str(original), Task.load(a_task(tmp_path, stop=[stop])), outputs=kept[1])
    stopped = [row["answer"] for _, row in sorted(read(kept[1])[1].items())]
    assert stopped == [text.partition(stop)[0].strip() for text in free]
    assert stopped != free
    # An answer's length is its own: what pads it while others of its batch continue is no part of it.
    alone = tmp_path / "alone.jsonl"
    evaluate_task(str(original), Task.load(a_task(tmp_path, stop=[stop])), outputs=alone, batch_size=1)
    assert read(alone)[1] == read(kept[1])[1]
    assert len({row["tokens"] for row in read(alone)[1].values()}) > 1
