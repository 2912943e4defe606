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
    spread,
)


@spread
def plan(
    source: Source,
    *,
    kv_heads: KVHeads = None,
    layers: Layers = None,
    kv_budget: Annotated[
        str | None,
        typer.Option(
            "--kv-budget",
            help="What the KV cache may take, such as 25%, or 64KiB per token at 16 bits a number; G by layer then.",
        ),
    ] = None,
    method: Method = None,
    grouping: Grouping = None,
    calibration: Calibration,
    tensor_parallel: TensorParallel = None,
    seed: Seed = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; standard output without.")
    ] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write down what a conversion should do, as JSON that you can edit; with --kv-budget, find G for each layer."""
    from ..console import Told, err, show_plan
    from ..conversion.plan import plan as plan_checkpoint
    from ..processes import launched
    from ..record import write_whole

    with launched() as processes:
        if processes.rank > 0:
            processes.assist()
            return
        if output is not None:
            check_file(output)
        text = calibration.text()
        made, layout = plan_checkpoint(
            source,
            kv_heads=kv_heads,
            layers=layers,
            kv_budget=kv_budget,
            method=method,
            grouping=grouping,
            tensor_parallel=tensor_parallel,
            seed=seed,
            calibration=text,
            repair=calibration.repair,
            device=calibration.device,
            revision=revision,
            allow_pickle=allow_pickle,
            listener=Told(),
            processes=processes,
        )
        show_plan(made, layout)
        if output is None:
            typer.echo(made.dumps(), nl=False)
            return
        write_whole(output, made.dumps(), "the plan")
        again = {"plan": output, "revision": revision, "allow_pickle": allow_pickle}
        again |= {} if made.predicted_kl is None else calibration.given()
        following = command("convert", source, "DST", **again)
        err.print(f"wrote {output}; carry it out with: {following}")
