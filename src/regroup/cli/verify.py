"""``regroup verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowPickle, Record, check_file


def verify(
    original: Annotated[str, typer.Argument(metavar="ORIGINAL", help="The original model: a folder or a hub id.")],
    converted: Annotated[str, typer.Argument(metavar="CONVERTED", help="Folder of the converted model.")],
    plan: Annotated[
        Path | None, typer.Option(help="Plan file of the conversion. [default: the one in CONVERTED]")
    ] = None,
    uptrained: Annotated[
        bool, typer.Option("--uptrained", help="The converted model was trained afterwards: check only its structure.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Text or pairs: also compare both models' loss with the plan's prediction.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Maximum number of windows or pairs.")] = None,
    device: Annotated[
        str | None, typer.Option(help="Device for scoring text. [default: a GPU if available, else cpu]")
    ] = None,
    allow_pickle: AllowPickle = False,
    output: Record = None,
) -> None:
    """Check a converted model against its original and its plan: tensors, copied bytes, merged heads, loss on text.

    Exit status 0: all checks passed; 1: a check failed; 2: the check could not run.
    """
    from ..api import verify as run
    from ..console import ConsoleListener, err, out
    from ..record import write_record

    if output is not None:
        check_file(output)
    record = run(
        original,
        converted,
        plan=plan,
        allow_pickle=allow_pickle,
        uptrained=uptrained,
        data=data,
        window=window,
        windows=windows,
        device=device,
        listener=ConsoleListener(),
    )
    marks = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "")}
    for check in record["results"]["checks"]:
        out.label(*marks[check["passed"]], f"{check['name']}: {check['detail']}")
    if output is not None:
        write_record(output, record)
        err.print(f"wrote {output}")
    passed = record["results"]["verdict"] == "passed"
    out.label(*(("all checks passed", "bold green") if passed else ("a check failed", "bold red")))
    if not passed:
        raise typer.Exit(1)
