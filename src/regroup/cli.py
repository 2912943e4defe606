"""The verbs. Each imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import signal
import time
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
            _fail("interrupted; nothing half-written was left behind")
        except OSError as error:
            _fail(
                f"the system refused: {error.strerror or error}"
                + (f"\n  file:     {error.filename}" if error.filename else "")
            )


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(importlib.metadata.version("regroup-gqa"))
        raise typer.Exit


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a multi-head checkpoint into a grouped-query one.",
)


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
AllowPickle = Annotated[bool, typer.Option("--allow-pickle", help="Read pickled weights where there is nothing else.")]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", help="KV heads of every layer (1 is MQA).")]
Layers = Annotated[str | None, typer.Option(help="KV heads by layer, such as 0-3:8,4-31:4 or cross.0-5:2.")]
Method = Annotated[
    str | None,
    typer.Option(help="How heads are merged: auto, lowrank, procrustes, or the paper's mean, first, random."),
]
TensorParallel = Annotated[
    int | None, typer.Option(help="Devices that will share a layer; checked against the KV heads.")
]
Grouping = Annotated[
    str | None,
    typer.Option(
        help="contiguous: neighbours share a head; search: heads that belong together (the default with auto)."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of the random method and of the search.")]
Calibration = Annotated[
    str | None,
    typer.Option(help="Text, JSON lines, a data set (hf:name), or pairs to convert on: slower, and far better."),
]
CalibrationTokens = Annotated[int | None, typer.Option(min=1, help="Tokens of it at most. [default: 65,536]")]
CalibrationWindow = Annotated[int | None, typer.Option(min=2, help="Tokens a window of it. [default: 512]")]
CalibrationBatch = Annotated[int | None, typer.Option(min=1, help="Windows or pairs of it at a time. [default: 4]")]
DocumentStarts = Annotated[
    bool, typer.Option("--document-starts", help="Begin windows where documents begin, instead of joining documents.")
]
Repair = Annotated[
    str | None,
    typer.Option(help="With calibration: none, output (solve output projections again, the default) or distill."),
]
Device = Annotated[str | None, typer.Option(help="Where calibration runs; a GPU where there is one.")]


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A folder, a config.json, a .gguf file or a hub id.")],
    kv_heads: Annotated[
        str | None, typer.Option("--kv-heads", help="Show the cache at these G, such as 8,4,1.")
    ] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    encoder_context: Annotated[int | None, typer.Option(min=1, help="Tokens that cross-attention keeps.")] = None,
    similarity: Annotated[
        bool, typer.Option("--similarity", help="Also read the weights, and show how alike KV heads are.")
    ] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the plots of --similarity.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print plain data; bytes throughout.")] = False,
    revision: Revision = None,
) -> None:
    """Say where the heads are and what the KV cache costs, from headers alone."""
    from .inspection import summarize

    if output is not None and not similarity:
        raise RegroupError("a folder for plots was given, and nothing to plot", remedy="add --similarity")
    summary = summarize(source, revision=revision)
    chosen = _numbers(kv_heads) if kv_heads is not None else _default_groups(summary.layers)
    plots = Path("regroup-similarity") if output is None and not json else output
    compared = _compare(source, summary, plots, revision) if similarity else None
    if json:
        import json as library

        facts = summary.to_json(chosen, context=context, batch=batch, encoder_context=encoder_context)
        if compared is not None:
            facts["similarity"] = [layer.to_json() for layer in compared]
        typer.echo(library.dumps(facts, indent=2))
        return
    from .console import err, show_similarity, show_summary

    show_summary(summary, chosen, context=context, batch=batch, encoder_context=encoder_context)
    if compared is not None:
        show_similarity(compared, len(summary.layers) - len(compared))
        err.print(f"wrote {plots}/overview.png and a plot of each layer beside it")


@app.command()
def plan(
    source: Source,
    kv_heads: KVHeads = None,
    layers: Layers = None,
    kv_budget: Annotated[
        str | None,
        typer.Option("--kv-budget", help="What the KV cache may take, such as 25% or 64KiB a token; G by layer then."),
    ] = None,
    method: Method = None,
    grouping: Grouping = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_window: CalibrationWindow = None,
    calibration_batch: CalibrationBatch = None,
    document_starts: DocumentStarts = False,
    repair: Repair = None,
    device: Device = None,
    tensor_parallel: TensorParallel = None,
    seed: Seed = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to write; standard output without.")
    ] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Write down what a conversion should do, as JSON that you can edit; with --kv-budget, find G for each layer."""
    from .console import Told, err, show_plan
    from .planning import plan_checkpoint

    if output is not None:
        _check_file(output)
    text = _calibration_text(
        calibration, calibration_tokens, calibration_window, calibration_batch, document_starts, repair
    )
    made, layout = plan_checkpoint(
        source,
        kv_heads=kv_heads,
        layers=layers,
        kv_budget=kv_budget,
        method=method,
        grouping=grouping,
        tensor_parallel=tensor_parallel,
        seed=seed,
        calibration=text,
        repair=repair or "output",
        device=device,
        revision=revision,
        allow_pickle=allow_pickle,
        listener=Told(),
    )
    show_plan(made, layout)
    if output is None:
        typer.echo(made.dumps(), nl=False)
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(made.dumps(), encoding="utf-8")
    again = "" if made.predicted_kl is None else f" --calibration {calibration}"
    err.print(f"wrote {output}; carry it out with: regroup convert {source} DST --plan {output}{again}")


@app.command()
def convert(
    source: Source,
    destination: Annotated[Path, typer.Argument(metavar="DST", help="A folder that does not exist yet.")],
    kv_heads: KVHeads = None,
    layers: Layers = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan instead of these options.")] = None,
    method: Method = None,
    grouping: Grouping = None,
    calibration: Calibration = None,
    calibration_tokens: CalibrationTokens = None,
    calibration_window: CalibrationWindow = None,
    calibration_batch: CalibrationBatch = None,
    document_starts: DocumentStarts = False,
    repair: Repair = None,
    device: Device = None,
    tensor_parallel: TensorParallel = None,
    seed: Seed = None,
    uptrain: Annotated[
        Path | None, typer.Option("--uptrain", help="A recipe (YAML) to uptrain the child with, before it becomes DST.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    workers: Annotated[int, typer.Option(min=1, help="Threads that read, merge and write.")] = 2,
) -> None:
    """Convert a checkpoint: fewer KV heads, everything else bit for bit."""
    from .console import Told, err, human_bytes
    from .pipeline import convert_checkpoint

    text = _calibration_text(
        calibration, calibration_tokens, calibration_window, calibration_batch, document_starts, repair
    )
    options: dict[str, Any] = {
        "kv_heads": kv_heads,
        "layers": layers,
        "method": method,
        "grouping": grouping,
        "tensor_parallel": tensor_parallel,
        "seed": seed,
        "plan": plan,
        "calibration": text,
        "repair": repair or "output",
        "revision": revision,
        "allow_pickle": allow_pickle,
    }

    def run(target: Path) -> Any:
        return convert_checkpoint(
            source, target, **options, device=device, workers=workers, dry_run=dry_run, listener=Told()
        )

    if uptrain is not None and dry_run:
        from .uptrain.chain import check_recipe

        check_recipe(uptrain, source, destination)
    elif uptrain is not None:
        from .uptrain.chain import convert_and_uptrain
        from .uptrain.watch import Shown

        convert_and_uptrain(source, destination, uptrain, run, options, listener=Shown())
        err.print(f"wrote {destination}; the record of its uptraining is in {destination}.uptraining/run")
        err.print(f"what it cost in quality: regroup evaluate {destination} --teacher {source} --data FILE")
        return
    started = time.perf_counter()
    done = run(destination)
    if done.destination is None:
        err.print("dry run: nothing was written")
        return
    rate = (done.preview.bytes_before + done.preview.bytes_after) / done.seconds
    whole = time.perf_counter() - started
    err.print(f"wrote {destination} in {whole:.1f} s; {human_bytes(rate)}/s read and written")
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
def uptrain(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="A converted checkpoint or a hub id.")] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text, JSON lines, parquet, pairs, a folder of those, or hf:NAME. May be given again."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Folder of the run: model/ (the result), checkpoint-N/, logs/, record.json, curve.png.",
        ),
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="A YAML file with any of the settings; options given here win.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Share of the parent's pre-training tokens; the paper: 0.05.")
    ] = None,
    pretraining_tokens: Annotated[
        str | None, typer.Option(help="Of the parent, such as 2T, where it is not a known one.")
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="Instead of a share: tokens, such as 300M.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of a share: optimizer steps.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The parent, to distil from: a folder or a hub id.")] = None,
    stages: Annotated[
        str | None, typer.Option(help="logit, local (layer by layer), or local,logit: one after the other.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Of both softmaxes in the KL.")] = None,
    distill_weight: Annotated[
        float | None, typer.Option(min=0, max=1, help="1: KL alone; 0: cross-entropy alone.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="Tell only the teacher's k largest logits apart.")] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="Folder that keeps those logits, for later runs on the same data.")
    ] = None,
    objective: Annotated[
        str | None, typer.Option(help="causal, span-corruption, pairs, or auto: as the family was trained.")
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens a sequence. [default: 512]")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Sequences a step, over all processes. [default: 8]")
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(min=1, help="Sequences of a process at once.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="The highest; the family's by default.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw, adafactor or auto.")] = None,
    schedule: Annotated[
        str | None, typer.Option(help="cosine, constant-decay, constant, inverse-sqrt or auto.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(min=0, max=1, help="Share of the steps. [default: 0.05]")] = None,
    original_steps: Annotated[
        int | None, typer.Option(min=1, help="Of the parent's pre-training, which inverse-sqrt continues.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of shuffling, noise and dropout. [default: 0]")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the computation: float32, bfloat16 or float16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Use torch.compile.")] = None,
    fsdp: Annotated[bool | None, typer.Option("--fsdp", help="Shard the student over the processes (FSDP2).")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Threads that tokenise ahead.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Text or pairs to evaluate on, now and then.")] = None,
    held_out_windows: Annotated[int | None, typer.Option(min=1, help="How many of it. [default: 32]")] = None,
    eval_every: Annotated[int | None, typer.Option(min=1, help="Steps. [default: a tenth of the run]")] = None,
    save_every: Annotated[int | None, typer.Option(min=1, help="Steps. [default: a tenth of the run]")] = None,
    log_every: Annotated[int | None, typer.Option(min=1, help="Steps. [default: 10]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; GPUs where there are some.")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Go on with the run in the output folder. [default: on]")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")] = False,
) -> None:
    """Bring a converted checkpoint back: train it for a share α of the original compute, or distil its parent."""
    given = {name: value for name, value in locals().items() if name not in ("recipe", "dry_run")}
    from .uptrain.processes import AgreedError, leave, rank

    try:
        from .uptrain.recipe import Recipe
        from .uptrain.run import uptrain as run
        from .uptrain.watch import Shown

        given["stages"] = tuple(stages.split(",")) if stages else None
        done = run(Recipe.load(recipe, **given), listener=Shown(), dry_run=dry_run)
    except AgreedError as error:
        if error.speaker:
            raise
        raise typer.Exit(2) from error
    finally:
        leave()
    if rank() == 0:
        from .console import err

        if done.model is None:
            err.print("dry run: nothing was written")
        else:
            err.print(f"wrote {done.model}, and {done.recipe.output}/record.json and curve.png")


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


def _compare(source: str, summary: Any, plots: Path | None, revision: str | None) -> Any:
    """How alike KV heads are (see ``convert.similarity``); plots go into a folder unless that is None."""
    from .console import count_progress
    from .convert.similarity import compare_heads
    from .opening import open_source
    from .plots import check_folder, draw_similarity

    if summary.format != "safetensors":
        raise RegroupError(
            "KV heads can be compared only where there are weights",
            file=source,
            expected="a checkpoint folder with safetensors files, or a hub id",
            got="a GGUF file" if summary.format == "gguf" else "a config without weights",
            remedy="give the folder that holds the weights, or leave --similarity out",
        )
    if plots is not None:
        check_folder(plots)
    with (
        open_source(source, revision=revision) as opened,
        count_progress("comparing heads, layers", len(opened.layout.layers)) as progress,
    ):
        found = compare_heads(opened.checkpoint, opened.layout, progress=progress)
    if plots is not None:
        draw_similarity(found, plots)
    return found


def _calibration_text(
    data: str | None, tokens: int | None, window: int | None, batch: int | None, starts: bool, repair: str | None
) -> Any:
    """The text that the options name; options about text that is not there are refused."""
    from .convert.text import CalibrationText
    from .planning import check_repair

    check_repair(repair or "output")
    given = {
        "--calibration-tokens": tokens,
        "--calibration-window": window,
        "--calibration-batch": batch,
        "--document-starts": starts or None,
        "--repair": repair,
    }
    if data is None:
        useless = [name for name, value in given.items() if value is not None]
        if useless:
            raise RegroupError(
                "an option needs calibration text, and there is none",
                got=", ".join(useless),
                remedy="add --calibration FILE, or leave it out",
            )
        return None
    sizes = {"tokens": tokens, "window": window, "batch": batch}
    return CalibrationText(
        data, **{name: size for name, size in sizes.items() if size is not None}, document_starts=starts
    )


def _check_file(output: Path) -> None:
    """Refuse a file that cannot be written, before the work that would go into it."""
    import os

    from .checkpoint.writer import existing_parent

    if output.is_dir():
        raise RegroupError("the output is a folder", file=output, remedy="name a file")
    if not os.access(output if output.exists() else existing_parent(output), os.W_OK):
        raise RegroupError("the output cannot be written", file=output, remedy="choose another place")


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
