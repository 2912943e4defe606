"""``regroup demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..extras import require


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, record and plot.")] = Path(
        "demo-output"
    ),
    windows: Annotated[int, typer.Option(min=2, help="Number of held-out windows of 256 tokens.")] = 64,
) -> None:
    """Convert a small embedded model with each method and several numbers of KV heads, and compare their loss."""
    require("train", "accelerate", "matplotlib")
    from ..demo.run import run_demo

    run_demo(output, windows=windows)
