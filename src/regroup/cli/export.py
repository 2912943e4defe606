"""``regroup export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowPickle, Revision


def export(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint folder, a hub id, or a GGUF file (to hf alone).")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="What does not exist yet: a folder; for gguf a file.")
    ],
    *,
    to: Annotated[str, typer.Option("--to", help="hf (stock transformers), vllm, or gguf (llama.cpp).")],
    expand: Annotated[
        bool, typer.Option("--expand", help="Repeat KV heads until a stock class holds them: larger cache.")
    ] = False,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Devices that will share a layer; KV heads are repeated where needed.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="To or from GGUF: float32, bfloat16 or float16. [default: the source's]")
    ] = None,
    check: Annotated[bool, typer.Option("--check/--no-check", help="Load the result and compare it.")] = True,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write a checkpoint in the form that an engine reads, and compare the result with its source."""
    from ..console import Told, err
    from ..exports.run import export_checkpoint

    done = export_checkpoint(
        source,
        destination,
        to=to,
        expand=expand,
        tensor_parallel=tensor_parallel,
        dtype=dtype,
        check=check,
        revision=revision,
        allow_pickle=allow_pickle,
        listener=Told("exporting"),
    )
    err.print(f"wrote {done.destination}: {done.form}")
    for note in done.notes:
        err.print(f"note: {note}")
    if done.checked is not None:
        err.label("checked", "green", f"with {done.checked}")
    else:
        err.label("not checked:", "yellow", done.unchecked or "")
