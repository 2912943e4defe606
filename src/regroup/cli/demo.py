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
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows of 256 tokens.")] = 64,
) -> None:
    """Convert a small embedded model to several G with each method, and show what each costs in quality."""
    require("train", "accelerate", "matplotlib")
    from ..demo.story import tell

    tell(output, windows=windows)
