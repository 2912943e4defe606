"""Everything that can be wrong with a run is found here, before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..checkpoint import Checkpoint, fetch
from ..errors import RegroupError
from ..families import is_encoder_decoder
from ..modeling import load, load_tokenizer
from ..modeling.lm_head import require_head
from ..opening import Source, open_source
from ..processes import world
from . import states
from .budget import Budget
from .checks import (
    check_reporting,
    check_room,
    check_sharding,
    check_window,
    checked_teacher,
    dropouts,
    state_of,
)
from .defaults import resolved
from .enough import check_enough
from .export import check_names, freeze_tables
from .job import Job, training_arguments
from .objective import keeps_documents_apart
from .parts import budget_of, cache_of, held_out_batches, local_steps_of, objective_of, teacher_of
from .recipe import Recipe
from .stream import open_stream


@dataclass
class Prepared:
    """A run that was checked as far as it can be without taking a step.

    Attributes:
        recipe: with nothing left open. digest: of it.
        checkpoint: that is trained, and whose form the result gets.
        student: on the CPU, in float32.
        job, arguments: of the trainer.
        budget: of the whole run.
        lines: for a person: what the run does, and why so.
        local_steps: of the budget, for the local stage. local_done: whether an earlier start did it.
        step, state, state_folder: that the run goes on from, or None.
    """

    recipe: Recipe
    digest: str
    source: Source
    student: Any
    teacher_folder: Path | None
    job: Job
    arguments: TrainingArguments
    budget: Budget
    lines: list[str]
    local_steps: int = 0
    local_done: bool = False
    step: int | None = None
    state: dict[str, Any] | None = None
    state_folder: Path | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint


def prepare(recipe: Recipe) -> Prepared:
    """Check a recipe against the model, the teacher, the data and the disk, and load what it needs.

    Raises:
        RegroupError: whatever would keep the run from being right.
    """
    run = states.occupied(recipe.output)
    folder = fetch(recipe.model)
    with open_source(str(folder)) as source:
        pass
    config = source.checkpoint.config
    encoder_decoder = is_encoder_decoder(config)
    recipe, choices = resolved(recipe, str(config.get("model_type")), encoder_decoder)
    if recipe.batch_size % world():
        raise RegroupError(
            "the batch cannot be shared by the processes",
            expected=f"a multiple of {world()}, the number of processes",
            got=recipe.batch_size,
            remedy="choose another --batch-size",
        )
    check_sharding(recipe)
    check_reporting(recipe)
    digest = recipe.digest()
    found = state_of(recipe, digest, run)
    state_folder, state = found if found is not None else (None, None)

    tokenizer = load_tokenizer(folder)
    local = recipe.output / states.LOCAL_FOLDER
    begun = local if (local / "config.json").is_file() else folder
    if state_folder is not None and state is not None:
        # The Trainer reads a sharded state itself, once the model is sharded.
        begun = folder if state["sharded"] else state_folder
    options: dict[str, Any] = {**dropouts(recipe, config)}
    require_head(folder)
    student: Any = load(begun, dtype=torch.float32, progress=False, **options)
    freeze_tables(student, source.checkpoint.tensors.keys())
    check_names(source.checkpoint, student, values=begun == folder)
    check_window(student.config, recipe.window)
    vocab_size = student.get_input_embeddings().weight.shape[0]

    teacher_folder = checked_teacher(recipe, folder, tokenizer, student)
    objective, facts = objective_of(recipe, tokenizer, student)
    stream = open_stream(
        recipe.data,
        tokenizer,
        objective,
        seed=recipe.seed,
        shuffle_buffer=recipe.shuffle_buffer,
        vocab_size=vocab_size,
        epochs=recipe.epochs,
        workers=recipe.workers,
    )
    if state is None:
        check_enough(recipe, stream, tokenizer)
    held_out = list(held_out_batches(recipe, tokenizer, objective, vocab_size))
    budget = budget_of(recipe, source, student, teacher_folder)
    local_steps = local_steps_of(recipe, budget.steps)
    if state is not None:
        stream.load_state_dict(state["stream"])
    elif begun == local:
        _skip(stream, recipe, local_steps)
    steps = budget.steps - local_steps
    check_room(recipe, source.checkpoint, student)

    teacher = None
    if teacher_folder is not None and (recipe.distill_weight or recipe.hidden_weight):
        cache = cache_of(recipe, teacher_folder, stream, objective, vocab_size)
        teacher = teacher_of(recipe, teacher_folder, cache, encoder_decoder)
        apart = teacher.loaded is None or not getattr(objective, "isolate", False)
        if not (apart or keeps_documents_apart(teacher.loaded)):
            facts.append("note: the teacher does not keep documents apart, and sees across their borders")
    job = Job(
        recipe=recipe,
        source=folder,
        stream=stream,
        steps=steps,
        count_tokens=objective.count_tokens,
        shifted=recipe.objective == "causal",
        teacher=teacher,
        held_out=held_out,
        digest=digest,
        first_example=local_steps * recipe.batch_size,
    )
    lines = [*budget.explain(), *choices, *facts, *_stream_lines(stream, recipe, budget)]
    lines.append(f"result: {recipe.output / states.MODEL_FOLDER}")
    if state is not None:
        lines.append(f"going on from step {state['step']} of {steps}: {state_folder}")
    arguments = training_arguments(recipe, steps)
    arguments.eval_on_start = bool(held_out) and state is None
    # Looking for parameters that a step did not use costs time, and only dropped layers leave any.
    dropped = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
    arguments.ddp_find_unused_parameters = any(getattr(student.config, name, 0) for name in dropped)
    return Prepared(
        recipe,
        digest,
        source,
        student,
        teacher_folder,
        job,
        arguments,
        budget,
        lines,
        local_steps,
        state is not None or begun == local,
        None if state is None else int(state["step"]),
        state,
        state_folder,
    )


def _skip(stream: Any, recipe: Recipe, steps: int) -> None:
    """Move a stream past the examples of the local stage."""
    batches = stream.batches(recipe.batch_size)
    for _ in range(steps):
        next(batches, None)
    batches.close()


def _stream_lines(stream: Any, recipe: Recipe, budget: Budget) -> list[str]:
    there = stream.estimated_tokens()
    if there is None:
        return []
    needed = budget.tokens / recipe.epochs
    line = f"data: about {there:,} tokens a pass, {recipe.epochs} {'pass' if recipe.epochs == 1 else 'passes'} at most"
    if there < 0.95 * needed:
        return [line, f"note: that is less than the run's {budget.tokens:,}; it ends where the data end. Raise epochs"]
    return [line]
