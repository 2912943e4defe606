"""The verbs. Each imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from .errors import RegroupError


class _Verbs(TyperGroup):
    """Turns whatever a user can act on into a message and exit status 2."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except RegroupError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted; nothing was left behind")
        except OSError as error:
            _fail(
                f"the system refused: {error.strerror or error}"
                + (f"\n  file:     {error.filename}" if error.filename else "")
            )


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a multi-head checkpoint into a grouped-query one.",
)

Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights where there is nothing else.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", help="KV heads of every layer (1 is MQA).")]
Layers = Annotated[str | None, typer.Option(help="KV heads by layer, such as 0-3:8,4-31:4 or cross.0-5:2.")]
Method = Annotated[
    str,
    typer.Option(help="How heads are merged: auto, lowrank, procrustes, or mean (the paper's), first, random."),
]
TensorParallel = Annotated[int, typer.Option(help="Devices that will share a layer; checked against the KV heads.")]
Seed = Annotated[int, typer.Option(help="Of the random method.")]


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a config.json, a .gguf file or a hub id.")],
    kv_heads: Annotated[
        str | None, typer.Option("--kv-heads", help="Show the cache at these G, such as 8,4,1.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    encoder_context: Annotated[int | None, typer.Option(min=1, help="Tokens that cross-attention keeps.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print plain data; bytes throughout.")] = False,
    revision: Revision = None,
) -> None:
    """Say where the heads are and what the KV cache costs, from headers alone."""
    from .inspection import summarize

    summary = summarize(source, revision=revision)
    chosen = _numbers(kv_heads) if kv_heads is not None else _default_groups(summary.layers)
    if json:
        import json as library

        facts = summary.to_json(chosen, context=context, batch=batch, encoder_context=encoder_context)
        typer.echo(library.dumps(facts, indent=2))
        return
    from .console import show_summary

    show_summary(summary, chosen, context=context, batch=batch, encoder_context=encoder_context)


@app.command()
def plan(
    source: Source,
    kv_heads: KVHeads = None,
    layers: Layers = None,
    method: Method = "auto",
    tensor_parallel: TensorParallel = 1,
    seed: Seed = 0,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; standard output without.")
    ] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write down what a conversion should do, as JSON that you can edit."""
    from .console import err, show_plan
    from .pipeline import choose_plan, open_layout

    layout = open_layout(source, revision=revision, allow_pickle=allow_pickle)
    made = choose_plan(
        layout,
        None,
        kv_heads=kv_heads,
        layers=layers,
        method=method,
        tensor_parallel=tensor_parallel,
        seed=seed,
    )
    show_plan(made, layout)
    if output is None:
        typer.echo(made.dumps(), nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(made.dumps(), encoding="utf-8")
    err.print(f"wrote {output}; carry it out with: regroup convert {source} DST --plan {output}")


@app.command()
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    kv_heads: KVHeads = None,
    layers: Layers = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan instead of these options.")] = None,
    method: Method = "auto",
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text, JSON lines, or pairs to convert on: slower, and far better."),
    ] = None,
    calibration_tokens: Annotated[int, typer.Option(min=1, help="Tokens of it at most.")] = 65_536,
    calibration_window: Annotated[int, typer.Option(min=2, help="Tokens a window of it.")] = 512,
    calibration_batch: Annotated[int, typer.Option(min=1, help="Windows or pairs of it at a time.")] = 4,
    repair: Annotated[
        str, typer.Option(help="With calibration: none, output (solve output projections again) or distill.")
    ] = "output",
    device: Annotated[str | None, typer.Option(help="Where calibration runs; a GPU where there is one.")] = None,
    tensor_parallel: TensorParallel = 1,
    seed: Seed = 0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read, merge and write.")] = 2,
) -> None:
    """Convert a checkpoint: fewer KV heads, everything else bit for bit."""
    import contextlib

    from .checkpoint.writer import check_destination, existing_parent
    from .console import byte_progress, count_progress, err, human_bytes, show_outcomes, show_plan, show_preview
    from .convert import convert as write_child
    from .convert import preview
    from .convert.calibrate import REPAIRS, Settings
    from .convert.text import CalibrationText
    from .pipeline import calibrated, choose_plan, open_source

    if plan is not None and (kv_heads is not None or layers is not None):
        raise RegroupError("a plan and its parts were both given", remedy="give --plan, or --kv-heads and --layers")
    if repair not in REPAIRS:
        raise RegroupError("the repair is not known", expected=", ".join(REPAIRS), got=repair)
    text = None
    if calibration is not None:
        text = CalibrationText(calibration, calibration_tokens, calibration_window, calibration_batch)
    scratch = existing_parent(destination)
    with open_source(source, revision=revision, allow_pickle=allow_pickle, scratch=scratch) as opened:
        checkpoint, layout = opened.checkpoint, opened.layout
        chosen = choose_plan(
            layout,
            plan,
            kv_heads=kv_heads,
            layers=layers,
            method=method,
            tensor_parallel=tensor_parallel,
            seed=seed,
        )
        ahead = preview(checkpoint, layout, chosen)
        show_plan(chosen, layout)
        show_preview(ahead)
        if opened.ignores_code:
            err.print("[yellow]note:[/yellow] the source asks for code of its own; it is neither run nor copied")
        check_destination(destination, opened.folder, ahead.bytes_after)
        if dry_run:
            err.print("dry run: nothing was written")
            return
        with contextlib.ExitStack() as stack:
            given = None
            if text is not None:
                settings = Settings(choose=plan is None and method == "auto", repair=repair)
                count = stack.enter_context(count_progress("calibrating, layers", layout.layers[-1].index + 1))
                solved = stack.enter_context(
                    calibrated(
                        opened,
                        chosen,
                        text,
                        settings,
                        scratch=scratch,
                        device=device,
                        progress=count,
                    )
                )
                chosen, given = solved.plan, solved.given
                show_outcomes(solved)
            progress = stack.enter_context(byte_progress("converting", ahead.bytes_after))
            done = write_child(
                checkpoint,
                layout,
                chosen,
                destination,
                given=given,
                parent=source,
                workers=workers,
                progress=progress,
            )
        rate = (ahead.bytes_before + ahead.bytes_after) / done.seconds
        err.print(f"wrote {destination} in {done.seconds:.1f} s ({human_bytes(rate)}/s read and written)")
        err.print(f"what it cost in quality: regroup evaluate {destination} --teacher {source} --data FILE")


@app.command()
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
    from .console import count_progress, out
    from .evaluate.run import evaluate as run
    from .record import write_record

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


@app.command()
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoints, record and plot.")] = Path(
        "demo-output"
    ),
    windows: Annotated[int, typer.Option(min=2, help="Held-out windows of 256 tokens.")] = 64,
) -> None:
    """Convert a small embedded model to several G with each method, and show what each costs in quality."""
    from .demo.story import tell

    tell(output, windows=windows)


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RegroupError("the numbers cannot be read", expected="such as 8,4,1", got=text) from None


def _default_groups(layers: Any) -> list[int]:
    """Divisors of the query heads below the present KV heads: half, a quarter, … and one."""
    most = max(layer.num_key_value_heads for layer in layers)
    divisors = [g for g in range(most - 1, 0, -1) if most % g == 0]
    return [g for g in divisors if all(layer.num_attention_heads % g == 0 for layer in layers)]


def _fail(message: str) -> NoReturn:
    from .console import err

    err.print(f"[bold red]error:[/bold red] {_escaped(message)}")
    raise typer.Exit(2)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def main() -> None:
    """Entry point of the ``regroup`` command."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # A service manager's stop cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, stop)
    app()


if __name__ == "__main__":
    main()
