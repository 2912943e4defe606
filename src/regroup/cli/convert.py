"""``regroup convert``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegroupError
from ..safe_text import command
from .options import (
    AllowPickle,
    Calibration,
    Grouping,
    KVHeads,
    Layers,
    Method,
    Revision,
    Seed,
    Source,
    TensorParallel,
    resumable,
    with_option_groups,
)


@with_option_groups
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="Folder to create; it must not exist.")],
    *,
    kv_heads: KVHeads = None,
    layers: Layers = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="Plan file; replaces numbers of KV heads, method, grouping, tensor parallelism and seed."
        ),
    ] = None,
    method: Method = None,
    grouping: Grouping = None,
    calibration: Calibration,
    tensor_parallel: TensorParallel = None,
    seed: Seed = None,
    uptrain: Annotated[
        Path | None,
        typer.Option("--uptrain", help="Recipe (YAML) for uptraining the converted model before DST appears."),
    ] = None,
    keep_calibration: Annotated[
        bool, typer.Option(help="Keep the text that the original model wrote in DST (regroup_calibration.jsonl).")
    ] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, estimate time and disk space, and write nothing.")
    ] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    workers: Annotated[int, typer.Option(min=1, help="Number of threads that read, merge and write.")] = 2,
) -> None:
    """Convert a checkpoint to fewer KV heads; all other tensors are copied bit for bit."""
    from ..api import convert as convert_checkpoint
    from ..console import ConsoleListener, err, show_estimate
    from ..conversion.request import calibrated_by_default
    from ..processes import launched

    with launched() as processes:
        if processes.rank > 0:
            processes.assist()
            return
        usual = calibrated_by_default({"plan": plan, "method": method})
        options: dict[str, Any] = {
            "kv_heads": kv_heads,
            "layers": layers,
            "method": method,
            "grouping": grouping,
            "tensor_parallel": tensor_parallel,
            "seed": seed,
            "plan": plan,
            "calibration": calibration.text(usual=usual, seed=seed),
            "repair": calibration.repair,
            "revision": revision,
            "allow_pickle": allow_pickle,
        }
        rest = {
            "device": calibration.device,
            "workers": workers,
            "dry_run": dry_run,
            "keep_calibration": keep_calibration,
            "processes": processes,
        }

        score = command("evaluate", destination, teacher=source, data="FILE")

        def run(target: Path) -> Any:
            return convert_checkpoint(source, target, **options, **rest, listener=ConsoleListener())

        if uptrain is not None and processes.size > 1:
            raise RegroupError(
                "--uptrain does not run in several processes",
                got=f"{processes.size} processes",
                remedy="convert first, then start `regroup uptrain` with the launcher",
            )
        if uptrain is not None and dry_run:
            from ..uptraining.chain import check_recipe

            check_recipe(uptrain, source, destination)
        elif uptrain is not None:
            from ..uptraining.chain import convert_and_uptrain, uptraining_of
            from ..uptraining.listener import ConsoleListener as UptrainingListener

            with resumable(*uptraining_of(destination)):
                convert_and_uptrain(source, destination, uptrain, run, options, listener=UptrainingListener())
            err.print(f"wrote {destination}; its uptraining record is in {destination}.uptraining/run")
            err.print(f"to measure the quality: {score}")
            return
        started = time.perf_counter()
        done = run(destination)
        if done.destination is None:
            show_estimate(done.estimate, calibrated=done.result.plan.calibration is not None)
            return
        err.print(f"wrote {destination} in {time.perf_counter() - started:.1f} s")
        err.print(f"to measure the quality: {score}")
