"""``regroup uptrain``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import resumable


def uptrain(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", help="A converted checkpoint: a folder or a hub id.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="Training data: text, JSON lines, parquet, pairs, a folder of those, or hf:NAME. May be repeated. "
            "self or self:TOKENS: text that the teacher writes; self,FILE mixes half and half."
        ),
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
        Path | None, typer.Option(help="YAML file with settings; options on the command line override it.")
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Training tokens as a share of the original pre-training; 0.05 in the paper.")
    ] = None,
    pretraining_tokens: Annotated[
        str | None,
        typer.Option(help="Number of pre-training tokens of the original model, such as 2T, if it is not a known one."),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Number of training tokens, such as 300M, in place of --alpha.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Number of optimizer steps, in place of --alpha.")] = None,
    teacher: Annotated[
        str | None, typer.Option(help="Teacher for distillation, usually the original model: a folder or a hub id.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Temperature of both softmaxes in the KL divergence.")
    ] = None,
    distill_weight: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Weight of the KL divergence: 1 is KL only, 0 is cross-entropy only."),
    ] = None,
    hidden_weight: Annotated[
        float | None, typer.Option(min=0, help="Weight of the distance from the teacher's hidden states. [default: 10]")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="Distil only the teacher's k largest logits; the rest count as one.")
    ] = None,
    teacher_cache: Annotated[
        Path | None, typer.Option(help="Folder that caches the teacher's logits, for later runs on the same data.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(help="Training objective: causal, span-corruption, pairs, or auto (that of the family)."),
    ] = None,
    window: Annotated[int | None, typer.Option(min=2, help="Tokens per sequence. [default: 512]")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(min=1, help="Sequences per step, over all processes. [default: 8, or 4 to distil]"),
    ] = None,
    micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per forward pass of a process. [default: what fits]")
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(help="Windows of causal models: documents (one in each), packed, or auto (documents to distil)."),
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Passes over the data at most. [default: 1]")] = None,
    unique_tokens: Annotated[
        str | None, typer.Option(help="Number of tokens of a pass at most, such as 262k; the first ones of the data.")
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Peak learning rate. [default: the family's; of Muon by the width of the model]"),
    ] = None,
    attention_rate: Annotated[
        float | None,
        typer.Option(help="Multiple of the rate for projections of converted layers. [default: 4 with Muon, else 1]"),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="Optimizer: muon, adamw, adafactor or auto (muon to distil a decoder).")
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(help="Schedule of the learning rate: cosine, constant-decay, constant, inverse-sqrt or auto."),
    ] = None,
    warmup: Annotated[
        float | None, typer.Option(min=0, max=1, help="Warm-up, as a share of the steps. [default: 0.05]")
    ] = None,
    original_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Number of steps of the original pre-training, from which inverse-sqrt continues."),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of shuffling, span corruption and dropout. [default: 0]")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="Dtype of the computation: float32, bfloat16 or float16.")] = None,
    gradient_checkpointing: Annotated[
        bool | None,
        typer.Option("--gradient-checkpointing", help="Save memory by recomputing activations; takes a third longer."),
    ] = None,
    compile: Annotated[bool | None, typer.Option("--compile", help="Use torch.compile.")] = None,
    fsdp: Annotated[bool | None, typer.Option("--fsdp", help="Shard the student over the processes (FSDP2).")] = None,
    workers: Annotated[int | None, typer.Option(min=0, help="Number of threads that tokenise.")] = None,
    held_out: Annotated[str | None, typer.Option(help="Text or pairs for evaluation during the run, or self.")] = None,
    held_out_windows: Annotated[
        int | None, typer.Option(min=1, help="Number of held-out windows or pairs. [default: 32]")
    ] = None,
    eval_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between evaluations. [default: a tenth of the run]")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option(min=1, help="Steps between saved states. [default: a tenth of the run]")
    ] = None,
    log_every: Annotated[int | None, typer.Option(min=1, help="Steps between log entries. [default: 10]")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. [default: GPUs if available, else cpu]")] = None,
    resume: Annotated[
        bool | None, typer.Option("--resume/--no-resume", help="Resume the run in the output folder. [default: resume]")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, print the plan of the run, and write nothing.")
    ] = False,
) -> None:
    """Uptrain a converted checkpoint: continue pre-training for a share α of the original, or distil the original."""
    given = {name: value for name, value in locals().items() if name not in ("recipe", "dry_run")}
    from ..processes import leave, rank

    try:
        from ..api import uptrain as run
        from ..uptraining.listener import ConsoleListener
        from ..uptraining.recipe import Recipe

        loaded = Recipe.load(recipe, **given)
        with resumable(loaded.output):
            done = run(loaded, listener=ConsoleListener(), dry_run=dry_run)
    finally:
        leave()
    if rank() == 0:
        from ..console import err

        if done.model is None:
            err.print("dry run: nothing was written")
        elif done.finished_before:
            err.print(f"the run was already finished, and nothing was done; its result is {done.model}")
        else:
            err.print(f"wrote {done.model}, and {done.recipe.output}/record.json and curve.png")
