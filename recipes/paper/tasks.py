"""Answers to the tasks, judged as `regroup evaluate --task` does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regroup.evaluation.answers import evaluate_task
from regroup.evaluation.task import Task

from .variants import Bench

# Characters, of which a token is one: no pronunciation and next to no clause is longer.
LONGEST = {"pronunciation": 40, "restoration": 64}


def evaluate_pairs(bench: Bench, folder: Path, task: str) -> dict[str, Any]:
    """What a fine-tuned model gets right, with what it gets wrong as its symbol or character error rate.

    ``quality`` is 1 less the error rate, and 0 at the least: a model that does not end its answers can be wrong more
    often than there are characters.
    """
    asked = Task(
        name=task,
        data=bench.texts.dev(task),
        metrics=("character_error_rate",),
        max_new_tokens=LONGEST[task],
    )
    found = evaluate_task(str(folder), asked, batch_size=128, dtype="float32", device=bench.device)
    rate = found["results"]["metrics"]["character_error_rate"]
    return {"quality": max(0.0, 1 - rate["value"]), "error_rate": [rate[name] for name in ("value", "low", "high")]}


def evaluate_choices(bench: Bench, folder: Path) -> dict[str, Any]:
    """The share of passages whose real continuation a decoder finds the likeliest of four."""
    asked = Task(
        name="continuation",
        data=bench.texts.continuation,
        choices="choices",
        metrics=("accuracy",),
    )
    found = evaluate_task(str(folder), asked, batch_size=32, dtype="float32", device=bench.device)
    return {"continuation": found["results"]["metrics"]["accuracy"]["value"]}
