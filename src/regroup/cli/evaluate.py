"""``regroup evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint folder or a hub id.")],
    data: Annotated[
        Path,
        typer.Option(help="Held-out text, JSON lines with text, or for encoder-decoders pairs; perhaps gzipped."),
    ],
    teacher: Annotated[str | None, typer.Option(help="The parent: adds KL and top-1 agreement.")] = None,
    window: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    windows: Annotated[int | None, typer.Option(min=1, help="Windows or pairs at most.")] = None,
    document_starts: Annotated[
        bool, typer.Option("--document-starts", help="One window from the start of each long enough document.")
    ] = False,
    batch: Annotated[int, typer.Option(min=1, help="Windows or pairs at a time.")] = 8,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16, or auto: as stored.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU where there is one.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON record here.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the JSON record.")] = False,
) -> None:
    """Nats a token, perplexity and bits a byte on held-out text; with --teacher, the distance from the parent."""
    from ..console import count_progress, out
    from ..evaluate.run import evaluate as run
    from ..record import write_record

    with count_progress("evaluating", None) as progress:
        record = run(
            model,
            data,
            teacher=teacher,
            window=window,
            windows=windows,
            document_starts=document_starts,
            batch_size=batch,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if output is not None:
        write_record(output, record)
    if json:
        write_record(None, record)
        return
    for name, value in record["results"].items():
        out.print(f"{name:<24}{value:,}" if isinstance(value, int) else f"{name:<24}{value:.4f}")
