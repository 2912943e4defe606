"""``regroup uptrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import resumable


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
    hidden_weight: Annotated[
        float | None, typer.Option(min=0, help="Of the distance from the teacher's hidden states. [default: 10]")
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
    from ..processes import leave, rank

    try:
        from ..uptraining.listener import ConsoleListener
        from ..uptraining.recipe import Recipe
        from ..uptraining.run import uptrain as run

        given["stages"] = tuple(stages.split(",")) if stages else None
        settled = Recipe.load(recipe, **given)
        with resumable(settled.output):
            done = run(settled, listener=ConsoleListener(), dry_run=dry_run)
    finally:
        leave()
    if rank() == 0:
        from ..console import err

        if done.model is None:
            err.print("dry run: nothing was written")
        elif done.finished_before:
            err.print(f"nothing was done: the run was finished before; its result is {done.model}", markup=False)
        else:
            err.print(f"wrote {done.model}, and {done.recipe.output}/record.json and curve.png")
