"""`regroup evaluate --task` as one function: answer every row, judge the answers, compare two models, record."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoint import fetch, fingerprint
from ..data.batches import check_vocabulary
from ..devices import device_named
from ..errors import RegroupError
from ..modeling import load_tokenizer
from ..record import record
from . import choices, generate
from .bootstrap import LEVEL, RESAMPLES, interval, paired
from .metrics import GENERATING, check_installed
from .outputs import Outputs, read
from .prompts import check_positions, encode
from .run import check_dtype, load_for_scoring
from .task import Row, Task

_KIND = "evaluate/outputs"


def evaluate_task(
    model: str,
    task: Task,
    *,
    outputs: Path | None = None,
    against: Path | None = None,
    batch_size: int = 8,
    dtype: str = "auto",
    device: str | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Ask a model every row of a task and judge its answers.

    Greedy answers and likelihoods do not depend on the batch, up to the rounding of its arithmetic.

    Args:
        model: a checkpoint folder or hub id.
        task: see ``Task.load``.
        outputs: file that keeps answers as they come; the same call resumes from it. None keeps none.
        against: the outputs of another model on the same rows, to compare with.
        batch_size: rows at a time.
        dtype: of weights and activations; ``"auto"`` as stored.
        device: a torch device; a GPU where there is one.
        seed: of the bootstrap.
        progress: called with the rows that are answered and all rows, first with those that were answered before.

    Returns:
        A record (see ``regroup.record``): each metric with its 95% interval, and with ``against`` the difference.

    Raises:
        RegroupError: anything missing, unreadable or mismatched.
    """
    check_dtype(dtype)
    check_installed(task.metrics)
    rows = task.rows()
    digest = task.digest(rows)
    others = None if against is None else _others(against, task, digest, len(rows))
    folder, place = fetch(model), device_named(device)
    facts = {"kind": _KIND, "task": digest, "model": fingerprint(folder), "dtype": dtype}
    kept = Outputs(outputs, facts)
    missing = [number for number in range(len(rows)) if number not in kept.rows]
    if progress is not None:
        progress(len(rows) - len(missing), len(rows))
    if missing:
        loaded, tokenizer = load_for_scoring(folder, dtype, place), load_tokenizer(folder)
        if loaded.config.is_encoder_decoder and loaded.main_input_name != "input_ids":
            raise RegroupError("models that listen or look cannot be evaluated on text", file=folder)
        ask = _chosen if task.choices else _generated
        for found in ask(loaded, tokenizer, rows, missing, task, batch_size):
            kept.add(found)
            if progress is not None:
                progress(len(kept.rows), len(rows))
    mine = [kept.rows[number] for number in range(len(rows))]
    _check_fit(mine, rows, outputs)
    if others is not None:
        _check_fit(others, rows, against)
    results: dict[str, Any] = {"rows": len(rows), "metrics": {}}
    if not task.choices:
        results["mean_answer_tokens"] = float(np.mean([row["tokens"] for row in mine]))
    for name in task.metrics:
        table, value, lower = _judged(name, mine, rows)
        entry: dict[str, Any] = {**asdict(interval(table, value, seed=seed)), "lower_is_better": lower}
        if others is not None:
            entry["difference"] = asdict(paired(table, _judged(name, others, rows)[0], value, seed=seed))
        results["metrics"][name] = entry
    configuration = {
        "model": model,
        "task": task.name,
        "digest": digest,
        "against": None if against is None else against.name,
        "metrics": list(task.metrics),
        "max_new_tokens": task.max_new_tokens,
        "batch_size": batch_size,
        "dtype": dtype,
        "device": torch.device(place).type,
        "bootstrap": {"draws": RESAMPLES, "level": LEVEL, "seed": seed},
    }
    return record("evaluate/task", configuration, results)


def _others(path: Path, task: Task, digest: str, count: int) -> list[dict[str, Any]]:
    facts, found, _ = read(path)
    if facts.get("task") != digest:
        raise RegroupError(
            "the outputs to compare with are of other rows or settings",
            file=path,
            expected=f"outputs of {task.name}, {digest}",
            got=facts.get("task"),
            remedy="evaluate the other model on this task first",
        )
    if len(found) < count:
        raise RegroupError(
            "the outputs to compare with are not complete", file=path, expected=f"{count} rows", got=len(found)
        )
    return [found[number] for number in range(count)]


def _check_fit(answers: Sequence[dict[str, Any]], rows: Sequence[Row], path: Path | None) -> None:
    """Refuse answers that were changed by hand so that they are not of these rows."""
    for answer, row in zip(answers, rows, strict=True):
        if len(answer.get("log_likelihoods", ())) != len(row.choices):
            raise RegroupError(
                "an answer is not one to its row",
                file=path,
                expected=f"a likelihood of each of {len(row.choices)} choices" if row.choices else "a text",
                got=f"row {answer['row']}: {str(answer.get('log_likelihoods'))[:200]}",
                remedy="delete the file and evaluate again",
            )


def _generated(
    model: Any, tokenizer: Any, rows: Sequence[Row], missing: Sequence[int], task: Task, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Greedy answers, the longest prompts first: what does not fit into memory shows at once."""
    prompts = dict(zip(missing, encode([rows[n] for n in missing], task, tokenizer, model), strict=True))
    how = generate.settings(model, tokenizer, task)
    order = sorted(missing, key=lambda number: (-len(prompts[number]), number))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        answers = generate.answer(model, tokenizer, [prompts[number] for number in part], task, how)
        yield [
            {
                "row": number,
                "prompt": rows[number].prompt,
                "references": list(rows[number].references),
                "answer": generate.text_of(ids, tokenizer, task),
                "tokens": len(ids),
            }
            for number, ids in zip(part, answers, strict=True)
        ]


def _chosen(
    model: Any, tokenizer: Any, rows: Sequence[Row], missing: Sequence[int], task: Task, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    seq2seq = bool(model.config.is_encoder_decoder)
    start = generate.settings(model, tokenizer, task).decoder_start_token_id
    pairs = {
        number: choices.choice_ids(
            rows[number].prompt, rows[number].choices, tokenizer, seq2seq=seq2seq, most=task.max_source_tokens
        )
        for number in missing
    }
    for number, asked in pairs.items():
        if not all(context and wanted for context, wanted in asked):
            raise RegroupError("a prompt or a choice has no tokens", file=task.data, got=f"row {number + 1}")
    largest = max(max(ids) for asked in pairs.values() for pair in asked for ids in pair)
    check_vocabulary(largest, model.config.get_text_config().vocab_size)
    longest = {number: max(len(c) + (0 if seq2seq else len(w)) for c, w in pairs[number]) for number in missing}
    check_positions(model, task, max(longest.values()), "" if seq2seq else ", the choice included")
    order = sorted(missing, key=lambda number: (-longest[number], number))
    for first in range(0, len(order), batch_size):
        part = order[first : first + batch_size]
        found = choices.log_likelihoods(model, [pair for number in part for pair in pairs[number]], start)
        if any(math.isnan(value) for value in found):
            raise RegroupError(
                "the model's likelihoods are not numbers",
                file=task.data,
                got=f"nan at one of the rows {', '.join(str(number + 1) for number in part)}",
                remedy="see whether the weights are sound, or pass --dtype float32",
            )
        scores = iter(found)
        yield [
            {
                "row": number,
                "prompt": rows[number].prompt,
                "choices": list(rows[number].choices),
                "references": list(rows[number].references),
                "log_likelihoods": [next(scores) for _ in pairs[number]],
            }
            for number in part
        ]


def _judged(
    name: str, answers: Sequence[dict[str, Any]], rows: Sequence[Row]
) -> tuple[np.ndarray, Callable[[np.ndarray], float], bool]:
    """Numbers of each row, how their sums become the metric, and whether less is better."""
    if name in GENERATING:
        metric = GENERATING[name]
        table = metric.rows([answer["answer"] for answer in answers], [row.references for row in rows])
        return table, metric.value, metric.lower_is_better
    right = []
    for answer, row in zip(answers, rows, strict=True):
        scores = np.array(answer["log_likelihoods"])
        if name == "accuracy_by_length":
            scores = scores / [len(choice) for choice in row.choices]
        right.append((float(row.choices[int(scores.argmax())] == row.references[0]), 1.0))
    return np.array(right), lambda sums: float(sums[0] / sums[1]), False
