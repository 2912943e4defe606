"""``regroup inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegroupError
from ..extras import require
from .options import AllowPickle, Revision, check_file, numbers


def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a config.json, a .gguf file or a hub id.")],
    kv_heads: Annotated[
        str | None, typer.Option("--kv-heads", help="Numbers of KV heads to show the cache for, such as 8,4,1.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Number of tokens in the cache.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Number of sequences.")] = 1,
    encoder_context: Annotated[
        int | None, typer.Option(min=1, help="Number of tokens in the cross-attention cache.")
    ] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Also read the weights and show how similar KV heads are.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the plots of --similarity. [default: regroup-similarity]"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON; sizes in bytes.")] = False,
    record: Annotated[Path | None, typer.Option(help="Write a JSON record here, for `regroup report`.")] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Show the attention heads and the size of the KV cache, from file headers only."""
    from ..api import inspect as summarize

    if output is not None and not similarity:
        raise RegroupError("an output folder for plots needs --similarity", remedy="add --similarity")
    if record is not None:
        check_file(record)
    plots = Path("regroup-similarity") if output is None and not json else output
    chosen = None if kv_heads is None else numbers(kv_heads)
    summary = summarize(source, revision=revision, allow_pickle=allow_pickle)
    chosen = _default_groups(summary.layers) if chosen is None else chosen
    compared = _compare(source, summary, plots, revision, allow_pickle) if similarity else None
    facts = summary.to_json(chosen, context=context, batch=batch, encoder_context=encoder_context)
    if compared is not None:
        facts["similarity"] = [layer.to_json() for layer in compared]
    if record is not None:
        from ..record import record as new_record
        from ..record import write_record

        name = Path(source).name if Path(source).exists() else source
        write_record(record, new_record("inspect", {"model": name}, facts | {"source": name}))
    if json:
        import json as library

        typer.echo(library.dumps(facts, indent=2))
        return
    from ..console import err, show_similarity, show_summary

    show_summary(summary, chosen, context=context, batch=batch, encoder_context=encoder_context)
    if compared is not None:
        show_similarity(compared, len(summary.layers) - len(compared))
        err.print(f"wrote {plots}/overview.png and a plot of each layer")


def _compare(source: str, summary: Any, plots: Path | None, revision: str | None, allow_pickle: bool) -> Any:
    """The similarity of KV heads (see ``solver.similarity``); plots are written unless their folder is None."""
    from ..opening import open_source
    from ..plots import check_folder, draw_similarity
    from ..progress import stage
    from ..solver.similarity import compare_heads

    if summary.format != "safetensors":
        raise RegroupError(
            "comparing KV heads needs weights",
            file=summary.source,
            expected="a checkpoint folder with safetensors files, or a hub id",
            got="a GGUF file" if summary.format == "gguf" else "a config without weights",
            remedy="give the folder with the weights, or remove --similarity",
        )
    if plots is not None:
        require("report", "matplotlib")
        check_folder(plots)
    with (
        open_source(source, revision=revision, allow_pickle=allow_pickle) as opened,
        stage("comparing heads", len(opened.layout.layers), unit="layers") as progress,
    ):
        found = compare_heads(opened.checkpoint, opened.layout, progress=progress)
    if plots is not None:
        draw_similarity(found, plots)
    return found


def _default_groups(layers: Any) -> list[int]:
    """Divisors of the query heads below the current number of KV heads: half, a quarter, … and one."""
    most = max(layer.num_key_value_heads for layer in layers)
    divisors = [g for g in range(most - 1, 0, -1) if most % g == 0]
    return [g for g in divisors if all(layer.num_attention_heads % g == 0 for layer in layers)]
