"""``regroup demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, record and plot.")] = Path(
        "demo-output"
    ),
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows of 256 tokens.")] = 64,
) -> None:
    """Convert a small embedded model to several G with each method, and show what each costs in quality."""
    from ..demo.run import run_demo

    run_demo(output, windows=windows)
