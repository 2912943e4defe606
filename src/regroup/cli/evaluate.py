"""``regroup evaluate``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegroupError
from .options import AllowPickle, Json, Record, check_file


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")],
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out text or JSON lines (pairs for encoder-decoders); may be gzipped."),
    ] = None,
    task: Annotated[
        Path | None, typer.Option(help="YAML file of a task, with generated or multiple-choice answers.")
    ] = None,
    tasks: Annotated[str | None, typer.Option(help="Tasks of lm-evaluation-harness, such as arc_easy,piqa.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="With --data: the original model; adds KL and top-1 agreement.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="With --data: tokens per window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="With --data: maximum number of windows or pairs.")] = None,
    document_starts: Annotated[
        bool,
        typer.Option(
            "--document-starts", help="With --data: one window from the start of each document that is long enough."
        ),
    ] = False,
    outputs: Annotated[
        Path | None,
        typer.Option(
            help="With --task: save each answer to this file, and resume from it. [default: next to --output]"
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="With --task: outputs of another model, for a paired comparison.")
    ] = None,
    include_path: Annotated[Path | None, typer.Option(help="With --tasks: folder with additional task files.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --tasks: maximum number of rows per task.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size, in windows, pairs or rows.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto (as stored).")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, … [default: a GPU if available, else cpu]")] = None,
    allow_pickle: AllowPickle = False,
    output: Record = None,
    json: Json = False,
) -> None:
    """Evaluate on held-out text (--data), on a task (--task), or with lm-evaluation-harness (--tasks).

    --data gives nats per token, perplexity and bits per byte; with --teacher, also the KL divergence from it.
    """
    from ..record import write_record

    _check_options(
        {"--data": data, "--task": task, "--tasks": tasks},
        {
            "--data": {"--teacher": teacher, "--windows": windows, "--document-starts": document_starts or None},
            "--task": {"--outputs": outputs, "--against": against},
            "--tasks": {"--include-path": include_path, "--limit": limit},
        },
    )
    if output is not None:
        check_file(output, {"the data": data, "the task's file": task, "the outputs to compare with": against})
    shared: dict[str, Any] = {"batch_size": batch, "dtype": dtype, "device": device}
    if data is not None:
        from ..api import evaluate as run
        from ..progress import stage

        with stage("evaluating", None, unit="rows") as progress:
            record = run(
                model,
                data,
                teacher=teacher,
                window=window,
                windows=windows,
                document_starts=document_starts,
                allow_pickle=allow_pickle,
                progress=progress,
                ahead=progress.expect,
                **shared,
            )
    else:
        from ..opening import readable
        from ..progress import stage

        with readable(model, allow_pickle=allow_pickle) as place:
            if task is not None:
                record = _answers(place, task, outputs, output, against, shared)
            else:
                from ..evaluation.harness import evaluate_harness

                assert tasks is not None
                with stage("evaluating with lm-evaluation-harness", None):
                    record = evaluate_harness(place, tasks.split(","), include=include_path, limit=limit, **shared)
        record["configuration"]["model"] = model
    if output is not None:
        write_record(output, record)
    if json:
        write_record(None, record)
    else:
        _show(record)


def _check_options(modes: dict[str, Any], own: dict[str, dict[str, Any]]) -> None:
    """Require one way to evaluate, and only its options."""
    given = [name for name, value in modes.items() if value is not None]
    if len(given) != 1:
        raise RegroupError(
            "nothing to evaluate on was given" if not given else "several things to evaluate on were given",
            expected="one of --data, --task and --tasks",
            got=", ".join(given) or "none of them",
        )
    for mode, options in own.items():
        unused = [name for name, value in options.items() if value is not None]
        if mode != given[0] and unused:
            raise RegroupError(
                "an option does not belong to this way to evaluate",
                expected=f"{', '.join(unused)} only with {mode}",
                got=given[0],
                remedy="remove the option",
            )


def _answers(
    model: str, file: Path, outputs: Path | None, output: Path | None, against: Path | None, shared: dict[str, Any]
) -> dict[str, Any]:
    from ..evaluation.answers import evaluate_task
    from ..evaluation.task import Task
    from ..progress import stage

    task = Task.load(file)
    if outputs is None and output is not None:
        outputs = output.with_suffix(".outputs.jsonl")
    named = {"the task's data": task.data, "the task's file": file}
    if output is not None:
        check_file(output, named)
    if outputs is not None:
        check_file(outputs, {**named, "the record": output})
    first = True
    with stage(task.name, len(task.rows()), unit="rows") as progress:

        def count(answered: int, _: int) -> None:
            nonlocal first
            if first:
                progress.begin(answered)
            else:
                progress(answered - progress.done)
            first = False

        return evaluate_task(model, task, outputs=outputs, against=against, progress=count, **shared)


def _show(record: dict[str, Any]) -> None:
    from rich.table import Table

    from ..console import out

    results = record["results"]
    if record["kind"] == "evaluate/task":
        compared = record["configuration"]["against"]
        more = () if compared is None else (f"minus {compared}", "95% interval", "p")
        table = Table("metric", "value", "95% interval", *more, title=f"{results['rows']} rows")
        for name, found in results["metrics"].items():
            cells = [
                name.replace("_", "-"),
                _figure(found["value"]),
                "–" if math.isnan(found["low"]) else f"{_figure(found['low'])} – {_figure(found['high'])}",
            ]
            if compared is not None:
                other = found["difference"]
                cells += [
                    f"{other['value']:+.4g}",
                    "–" if math.isnan(other["low"]) else f"{other['low']:+.4g} – {other['high']:+.4g}",
                    f"{other['p']:.3f}",
                ]
            table.add_row(*cells)
        out.print(table)
        return
    if record["kind"] == "evaluate/harness":
        table = Table("task", "metric", "value")
        for task, found in results["tasks"].items():
            for name, value in found.items():
                table.add_row(task, name, _figure(value))
        out.print(table)
        return
    for name, value in results.items():
        out.print(f"{name:<24}{value:,}" if isinstance(value, int) else f"{name:<24}{value:.4f}")


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"
