"""``regroup report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import check_file


def report(
    records: Annotated[list[Path], typer.Argument(help="JSON records that commands wrote with -o, and plans.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file.")] = Path("report.html"),
    title: Annotated[str, typer.Option(help="Title of the page.")] = "regroup report",
) -> None:
    """Make one self-contained HTML page from records: quality, speed, uptraining, memory."""
    from ..console import err
    from ..errors import human_bytes
    from ..report.page import write_report

    for record in records:
        check_file(output, {f"the record {record}": record})
    unused = write_report(records, output, title=title)
    for name in unused:
        err.print(f"not shown on the page: {name}")
    size = f", {human_bytes(output.stat().st_size)}" if output.is_file() else ""
    err.print(f"wrote {output}{size}")
