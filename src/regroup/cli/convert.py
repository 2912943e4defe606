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
    spread,
)


@spread
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    *,
    kv_heads: KVHeads = None,
    layers: Layers = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan instead of these options.")] = None,
    method: Method = None,
    grouping: Grouping = None,
    calibration: Calibration,
    tensor_parallel: TensorParallel = None,
    seed: Seed = None,
    uptrain: Annotated[
        Path | None, typer.Option("--uptrain", help="A recipe (YAML) to uptrain the child with, before it becomes DST.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, write nothing, and foretell time and disk.")
    ] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read, merge and write.")] = 2,
) -> None:
    """Convert a checkpoint: fewer KV heads, everything else bit for bit."""
    from ..console import Told, err, human_bytes, show_forecast
    from ..conversion.convert import convert
    from ..processes import launched

    with launched() as processes:
        if processes.rank > 0:
            processes.assist()
            return
        text = calibration.text()
        options: dict[str, Any] = {
            "kv_heads": kv_heads,
            "layers": layers,
            "method": method,
            "grouping": grouping,
            "tensor_parallel": tensor_parallel,
            "seed": seed,
            "plan": plan,
            "calibration": text,
            "repair": calibration.repair,
            "revision": revision,
            "allow_pickle": allow_pickle,
        }
        rest = {"device": calibration.device, "workers": workers, "dry_run": dry_run, "processes": processes}

        score = command("evaluate", destination, teacher=source, data="FILE")

        def run(target: Path) -> Any:
            return convert(source, target, **options, **rest, listener=Told())

        if uptrain is not None and processes.size > 1:
            raise RegroupError(
                "--uptrain was given to several processes",
                got=f"{processes.size} processes",
                remedy="convert first, then start `regroup uptrain` with the launcher",
            )
        if uptrain is not None and dry_run:
            from ..uptraining.chain import check_recipe

            check_recipe(uptrain, source, destination)
        elif uptrain is not None:
            from ..uptraining.chain import convert_and_uptrain, uptraining_of
            from ..uptraining.listener import ConsoleListener

            with resumable(*uptraining_of(destination)):
                convert_and_uptrain(source, destination, uptrain, run, options, listener=ConsoleListener())
            err.print(f"wrote {destination}; the record of its uptraining is in {destination}.uptraining/run")
            err.print(f"what it cost in quality: {score}")
            return
        started = time.perf_counter()
        done = run(destination)
        if done.destination is None:
            show_forecast(done.estimate, calibrated=done.result.plan.calibration is not None)
            return
        rate = (done.preview.bytes_before + done.preview.bytes_after) / done.seconds
        whole = time.perf_counter() - started
        err.print(f"wrote {destination} in {whole:.1f} s; {human_bytes(rate)}/s read and written")
        err.print(f"what it cost in quality: {score}")
