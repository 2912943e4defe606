"""``regroup export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import AllowPickle, Revision


def export(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint folder, a hub id, or (only with --to hf) a GGUF file.")
    ],
    destination: Annotated[
        Path, typer.Argument(metavar="DST", help="Folder to create, or file for gguf; it must not exist.")
    ],
    *,
    to: Annotated[str, typer.Option("--to", help="Target format: hf (stock transformers), vllm, or gguf (llama.cpp).")],
    expand: Annotated[
        bool, typer.Option("--expand", help="Repeat KV heads until a stock class can hold them; the cache grows.")
    ] = False,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="Number of tensor-parallel devices; KV heads are repeated as needed.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype for export to or from GGUF: float32, bfloat16, float16. [default: the source's]"),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check/--no-check", help="Load the result and compare its logits with the source.")
    ] = True,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Export a checkpoint for an inference engine, and compare the result with the source."""
    from ..api import export as export_checkpoint
    from ..console import ConsoleListener, err

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
        listener=ConsoleListener("exporting"),
    )
    err.print(f"wrote {done.destination}: {done.form}")
    for note in done.notes:
        err.label("note:", "yellow", note)
    if done.checked is not None:
        err.label("checked", "green", f"with {done.checked}")
    else:
        err.label("not checked:", "yellow", "--no-check")
