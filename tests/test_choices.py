"""Lists of choices: every one is shown where none fits, every one is accepted, and help names them all."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers import refused, run
from regroup.advice.hardware import KNOWN
from regroup.bench.build import DTYPES as BENCH_DTYPES
from regroup.conversion.request import GROUPINGS
from regroup.evaluation.metrics import CHOOSING, GENERATING
from regroup.evaluation.run import _DTYPES as SCORED_DTYPES
from regroup.exports.request import TARGETS
from regroup.merge.registry import METHODS
from regroup.plans import ASKED_METHODS, REPAIRS, LayerPlan
from regroup.uptraining.schedule import SCHEDULES
from regroup.uptraining.settings import OBJECTIVES, OPTIMIZERS

# What a verb needs beside the option, by the verb; {p} is a checkpoint, {t} text, {o} a place for output.
NEEDS = {
    "plan": "{p} --kv-heads 2",
    "convert": "{p} {o} --kv-heads 2 --dry-run",
    "export": "{p} {o}",
    "evaluate": "{p} --data {t} --window 16 --windows 1",
    "advise": "{p} --context 64 --batch 1",
    "bench decode": "{p} --dry-run",
    "bench attention": "--dry-run",
    "uptrain": "{c} --data {t} --steps 1 --window 16 -o {o} --device cpu --dry-run",
}
# (verb, option, choices as the code has them)
OPTIONS = [
    ("plan", "--method", ASKED_METHODS),
    ("convert", "--method", ASKED_METHODS),
    ("convert", "--grouping", GROUPINGS),
    ("plan", "--repair", REPAIRS),
    ("convert", "--repair", REPAIRS),
    ("export", "--to", TARGETS),
    ("evaluate", "--dtype", tuple(SCORED_DTYPES)),
    ("bench decode", "--dtype", tuple(BENCH_DTYPES)),
    ("bench attention", "--dtype", tuple(BENCH_DTYPES)),
    ("advise", "--hardware", (*KNOWN, "this")),
    ("uptrain", "--objective", ("auto", *OBJECTIVES)),
    ("uptrain", "--optimizer", ("auto", *OPTIMIZERS)),
    ("uptrain", "--schedule", ("auto", *SCHEDULES)),
    ("uptrain", "--dtype", tuple(BENCH_DTYPES)),
]
IDS = [f"{verb} {option}" for verb, option, _ in OPTIONS]


@pytest.mark.parametrize(("verb", "option", "choices"), OPTIONS, ids=IDS)
def test_a_wrong_choice_is_told_the_right_ones(
    verb: str, option: str, choices: tuple[str, ...], shop: Path, tmp_path: Path
) -> None:
    places = {"p": shop / "parent", "c": shop / "child", "t": shop / "held-out.txt", "o": tmp_path / "o"}
    needs = [word.format(**places) for word in NEEDS[verb].split()]
    message = refused(*verb.split(), *needs, option, "qqqq")
    expected = re.search(r"expected: +(.*)", message)
    assert expected is not None, message
    assert re.split(r", (?:or )?| or ", expected[1].removeprefix("one of ")) == list(choices)


@pytest.mark.parametrize(("verb", "option", "choices"), OPTIONS, ids=IDS)
def test_help_names_every_choice(verb: str, option: str, choices: tuple[str, ...]) -> None:
    text = " ".join(run(*verb.split(), "--help")[1].split())
    words = text[text.index(f" {option} <") :].split(" --", 2)[1]
    if option != "--hardware":  # whose table is long, and is listed by the refusal
        assert [choice for choice in choices if not re.search(rf"\b{choice}\b", words)] == []


@pytest.mark.parametrize("method", ASKED_METHODS)
def test_every_method_is_accepted(method: str, shop: Path) -> None:
    assert run("plan", shop / "parent", "--kv-heads", 2, "--method", method)[0] == 0


def test_a_plan_names_methods_and_not_that_one_be_chosen() -> None:
    """``auto`` is asked for; what a plan's file says is settled."""
    assert set(ASKED_METHODS) - set(METHODS) == {"auto"}
    assert LayerPlan.__dataclass_fields__["key_method"].default in (*METHODS, LayerPlan)


@pytest.mark.parametrize(("more", "known"), [("", GENERATING), ("choices: choices\n", CHOOSING)])
def test_a_tasks_metrics(more: str, known: dict[str, object], shop: Path, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_text(f"data: rows.jsonl\nprompt: '{{text}}'\nmetrics: [qqqq]\n{more}", encoding="utf-8")
    assert "some of " + ", ".join(known) in refused("evaluate", shop / "parent", "--task", file)
