"""``regroup bench decode`` and ``regroup bench attention``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegroupError
from ..extras import require
from .options import AllowPickle, Command, Json, Record, check_file, numbers, summary

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode=None,
    help="Measure decoding speed against the limits of this machine: whole models, or attention alone.",
)

DType = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the estimates, and measure nothing.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, …")]


def decode(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_CONFIG", help="A folder, a config.json, or a hub id.")],
    kv_heads: Annotated[
        str | None, typer.Option("--kv-heads", help="Numbers of KV heads, such as 32,8,4,1. [default: the model's]")
    ] = None,
    batch: Annotated[int, typer.Option(help="Number of sequences.")] = 1,
    prompt: Annotated[int, typer.Option(help="Number of prompt tokens.")] = 512,
    new: Annotated[int, typer.Option(help="Number of tokens to generate.")] = 32,
    dtype: DType = "float32",
    layers: Annotated[
        int | None, typer.Option(help="Number of decoder layers to use. [default: all, or as many as fit in memory]")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Number of repetitions.")] = 1,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also measure transformers with its defaults.")] = False,
    device: Device = "cpu",
    allow_pickle: AllowPickle = False,
    dry_run: DryRun = False,
    output: Record = None,
    plot: Annotated[Path | None, typer.Option(help="Plot time against KV heads to this PNG.")] = None,
    json: Json = False,
) -> None:
    """Measure a model's decoding speed at several numbers of KV heads, and compare with the machine's limits.

    Uses the checkpoint's weights for its own number of KV heads, and random weights of the same shapes for others.
    The encoder of an encoder-decoder is not run; its output is random.
    """
    from ..bench.decode import benchmark
    from ..bench.work import Roofs, Work, models_for
    from ..console import err, out
    from ..devices import device_named
    from ..opening import readable
    from ..progress import duration, stage
    from ..record import write_record
    from . import bench_tables as tables

    screen = err if json else out
    for file in (output, plot):
        if file is not None:
            check_file(file)
    if plot is not None:
        require("report", "matplotlib")
    heads = None if kv_heads is None else numbers(kv_heads)
    if plot is not None and (heads is None or len(set(heads)) < 2):
        raise RegroupError(
            "a plot against KV heads needs at least two numbers of them", remedy="add --kv-heads 32,8,4,1"
        )
    work = Work(batch, prompt, new, dtype, str(device_named(device)), repeats)
    with readable(model, allow_pickle=allow_pickle) as place:
        models = models_for(place, heads, work, layers=layers)
        tables.show_work(screen, model, models, work)
        if dry_run:
            screen.print("dry run: nothing was measured")
            return
        screen.print("measuring the memory bandwidth and matrix multiplication rate of this machine …")
        roofs = Roofs(work)
        tables.show_ceiling(screen, models, work, roofs)
        paths = ("regroup", "transformers") if baseline else ("regroup",)
        screen.print(
            f"decoding; this takes about {duration(tables.expected_seconds(models, work, roofs, len(paths)))} …"
        )
        started = time.perf_counter()

        def measured(found: dict[str, Any]) -> None:
            tables.show_model(screen, found, paths)
            progress(1)

        with stage("decoding", len(models), unit="models", calm=True) as progress:
            record = benchmark(model, models, work, paths=paths, roofs=roofs, each=measured)
        tables.show_comparison(screen, record, paths)
        screen.print(f"took {duration(time.perf_counter() - started)}")
    _finish(record, output, json, write_record, err)
    if plot is not None:
        from ..bench.plot import draw_groups

        draw_groups(record, plot)
        err.print(f"wrote {plot}")


def attention(
    kv_heads: Annotated[str, typer.Option("--kv-heads", help="Numbers of KV heads.")] = "32,8,4,1",
    heads: Annotated[int, typer.Option(help="Number of query heads.")] = 32,
    head_dim: Annotated[int, typer.Option("--head-dim", help="Width of a head.")] = 128,
    batch: Annotated[str, typer.Option(help="Batch sizes, such as 1,8.")] = "8",
    context: Annotated[str, typer.Option(help="Numbers of tokens in the cache, such as 1024,4096.")] = "4096",
    dtype: DType = "float32",
    limit: Annotated[float, typer.Option(help="Skip shapes with more GB of keys and values than this.")] = 4.0,
    flex: Annotated[
        bool, typer.Option("--flex", help="Also measure FlexAttention, which compiles for each shape.")
    ] = False,
    device: Device = "cpu",
    work: Annotated[
        Path | None, typer.Option(help="Save measurements to this file, and skip those that are in it.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="With --work: stop after this many minutes, to resume later.")
    ] = None,
    dry_run: DryRun = False,
    output: Record = None,
    json: Json = False,
) -> None:
    """Measure one decoding step of attention alone, against PyTorch's implementations and the machine's limits.

    Implementations alternate within a run. Each shape takes about three seconds.
    """
    from ..bench.attention import grid
    from ..bench.journal import run_grid
    from ..console import err, out
    from ..devices import device_named
    from ..progress import stage
    from ..record import write_record
    from . import bench_tables as tables

    screen = err if json else out
    for file in (output, work):
        if file is not None:
            check_file(file)
    if minutes is not None and work is None:
        raise RegroupError("--minutes needs a file for the results", remedy="add --work FILE")
    dtypes = dtype.split(",")
    shapes = grid(
        batches=numbers(batch),
        contexts=numbers(context),
        kv_heads=numbers(kv_heads),
        dtypes=dtypes,
        heads=heads,
        head_dim=head_dim,
    )
    tables.show_shapes(screen, shapes)
    if dry_run:
        screen.print("dry run: nothing was measured")
        return

    def measured(found: dict[str, Any]) -> None:
        tables.show_shape(screen, found)
        progress(1)

    with stage("measuring", len(shapes), unit="shapes", calm=True) as progress:
        record = run_grid(
            shapes,
            device=str(device_named(device)),
            limit=int(limit * 1e9),
            work=work,
            minutes=minutes,
            flex=flex,
            each=measured,
        )
    if record is None:
        err.print(f"stopped after {minutes:g} minutes; run the same command again to resume from {work}")
        return
    _finish(record, output, json, write_record, err)


for _command in (decode, attention):
    app.command(cls=Command, short_help=summary(_command))(_command)


def _finish(record: dict[str, Any], output: Path | None, json: bool, write: Any, err: Any) -> None:
    if output is not None:
        write(output, record)
        err.print(f"wrote {output}")
    if json:
        write(None, record)
