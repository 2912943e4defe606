"""``regroup verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowPickle, Record, check_file


def verify(
    parent: Annotated[str, typer.Argument(metavar="PARENT", help="What was converted: a folder or a hub id.")],
    child: Annotated[str, typer.Argument(metavar="CHILD", help="The folder that came of it.")],
    plan: Annotated[Path | None, typer.Option(help="The plan that was carried out. [default: the child's]")] = None,
    uptrained: Annotated[
        bool, typer.Option("--uptrained", help="The child was trained since: check its structure alone.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="Text, or pairs: also score both on it, and compare with the prediction.")
    ] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows or pairs at most.")] = None,
    device: Annotated[str | None, typer.Option(help="Where text is scored; a GPU where there is one.")] = None,
    allow_pickle: AllowPickle = False,
    output: Record = None,
) -> None:
    """Check that a child is what its plan promises: tensors, untouched bytes, merged heads, and loss on text.

    Exit status 0: everything promised holds; 1: something does not; 2: it could not be checked.
    """
    from ..console import Told, err, out
    from ..record import write_record
    from ..verification import verify as run

    if output is not None:
        check_file(output)
    record = run(
        parent,
        child,
        plan=plan,
        allow_pickle=allow_pickle,
        uptrained=uptrained,
        data=data,
        window=window,
        windows=windows,
        device=device,
        listener=Told(),
    )
    marks = {True: ("✓", "green"), False: ("✗", "red"), None: ("–", "")}
    for promise in record["results"]["promises"]:
        out.label(*marks[promise["held"]], f"{promise['name']}: {promise['detail']}")
    if output is not None:
        write_record(output, record)
        err.print(f"wrote {output}")
    kept = record["results"]["verdict"] == "kept"
    out.label(*(("all promises are kept", "bold green") if kept else ("a promise is broken", "bold red")))
    if not kept:
        raise typer.Exit(1)
