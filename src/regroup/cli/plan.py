"""``regroup plan``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

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
    check_file,
    with_option_groups,
)


@with_option_groups
def plan(
    source: Source,
    *,
    kv_heads: KVHeads = None,
    layers: Layers = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            "--kv-budget",
            help="Size of the KV cache, such as 25% or 64KiB per token in 16 bits; chooses the KV heads of each layer "
            "by the loss on text.",
        ),
    ] = None,
    method: Method = None,
    grouping: Grouping = None,
    calibration: Calibration,
    tensor_parallel: TensorParallel = None,
    seed: Seed = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Plan file. [default: standard output]")] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a conversion plan as JSON that can be edited; --kv-budget chooses the number of KV heads of each layer.

    The plan names the calibration text, on which convert --plan calibrates. Only --kv-budget runs the model here.
    """
    from ..api import plan as make_plan
    from ..console import ConsoleListener, err, show_plan
    from ..conversion.request import calibrated_by_default
    from ..processes import launched
    from ..record import write_whole

    with launched() as processes:
        if processes.rank > 0:
            processes.assist()
            return
        if output is not None:
            check_file(output)
        made, layout = make_plan(
            source,
            kv_heads=kv_heads,
            layers=layers,
            kv_budget=kv_budget,
            method=method,
            grouping=grouping,
            tensor_parallel=tensor_parallel,
            seed=seed,
            calibration=calibration.text(usual=calibrated_by_default({"method": method}), seed=seed),
            repair=calibration.repair,
            device=calibration.device,
            revision=revision,
            allow_pickle=allow_pickle,
            listener=ConsoleListener(),
            processes=processes,
        )
        show_plan(made, layout)
        if output is None:
            typer.echo(made.dumps(), nl=False)
            return
        write_whole(output, made.dumps(), "the plan")
        # A plan names a file of text, and not its folder.
        place = None if made.calibration is None else made.calibration.data
        again = {"plan": output, "calibration": place, "revision": revision, "allow_pickle": allow_pickle}
        err.print(f"wrote {output}; convert with: {command('convert', source, 'DST', **again)}")
