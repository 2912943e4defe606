"""Everything that can be wrong with a run is found here, before the first step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fetch
from ..data import Batch
from ..data.text import check_window
from ..errors import RegroupError
from ..families import is_encoder_decoder
from ..modeling import load, load_tokenizer
from ..modeling.lm_head import require_head
from ..opening import Source, open_source
from ..processes import world
from . import sampled, states
from .budget import Budget, known_pretraining_tokens, plan_budget
from .checks import check_reporting, check_room, check_sharding, dropouts, state_of
from .defaults import resolved
from .distill import aligned_targets
from .export import check_names, freeze_tables
from .job import Job
from .learning import check_enough
from .memory import fitting_rows
from .objective import Objective, keeps_documents_apart, make_objective
from .own_text import is_own
from .recipe import Recipe
from .sampled import own_text, split_sources, windows_of, with_length
from .stream import held_out_examples, open_stream
from .teacher import check_teacher, open_cache, open_teacher
from .windows import WINDOWS, fitting_windows


def prepare(recipe: Recipe, *, dry_run: bool = False) -> Job:
    """Check a recipe against the model, the teacher, the data and the disk, and load what it needs.

    Args:
        recipe: what to do.
        dry_run: nothing is to be sampled.

    Raises:
        RegroupError: whatever would keep the run from being right.
    """
    run = states.occupied(recipe.output)
    folder = fetch(recipe.model)
    with open_source(str(folder)) as source:
        pass
    config = source.checkpoint.config
    encoder_decoder = is_encoder_decoder(config)
    recipe, choices = resolved(recipe, str(config.get("model_type")), encoder_decoder, source.layout.hidden_size)
    tokenizer = load_tokenizer(folder)
    if recipe.windows == "documents?":
        recipe = replace(recipe, windows=fitting_windows(recipe, tokenizer))
        choices.append(f"windows: {recipe.windows} ({WINDOWS[recipe.windows]})")
    if recipe.batch_size % world():
        raise RegroupError(
            "the batch cannot be shared by the processes",
            expected=f"a multiple of {world()}, the number of processes",
            got=recipe.batch_size,
            remedy="choose another --batch-size",
        )
    recipe = with_length(recipe)
    check_sharding(recipe)
    check_reporting(recipe)
    digest = recipe.digest()
    found = state_of(recipe, digest, run)
    state_folder, state = found if found is not None else (None, None)

    begun = folder
    if state_folder is not None and state is not None and not state["sharded"]:
        begun = state_folder  # a sharded state is read by the Trainer itself, once the model is sharded
    options: dict[str, Any] = {**dropouts(recipe, config)}
    require_head(folder)
    student: Any = load(begun, dtype=torch.float32, progress=False, **options)
    freeze_tables(student, source.checkpoint.tensors.keys())
    check_names(source.checkpoint, student, values=begun == folder)
    if not encoder_decoder:
        check_window(student.config.to_dict(), recipe.window)
    vocab_size = student.get_input_embeddings().weight.shape[0]

    teacher_folder = check_teacher(recipe, folder, tokenizer, student)
    objective, facts = _objective(recipe, tokenizer, student)
    own = own_text(recipe, teacher_folder)
    stream = open_stream(
        split_sources(recipe)[0],
        tokenizer,
        objective,
        seed=recipe.seed,
        shuffle_buffer=recipe.shuffle_buffer,
        vocab_size=vocab_size,
        epochs=recipe.epochs,
        workers=recipe.workers,
        own=own,
        limit=windows_of(recipe),
    )
    if state is None and own is None:
        check_enough(recipe, stream, tokenizer)
    if recipe.micro_batch is None:
        rows = fitting_rows(recipe, source.layout, recipe.batch_size // world())
        if rows < recipe.batch_size // world():
            recipe = replace(recipe, micro_batch=rows)
            choices.append(f"micro-batch: {rows} (activations of more take too much memory)")
    held_out = list(_held_out_batches(recipe, tokenizer, objective, vocab_size, teacher_folder, dry_run=dry_run))
    budget = _budget(recipe, source, student, teacher_folder)
    if state is not None:
        stream.load_state_dict(state["stream"])
    check_room(recipe, source.checkpoint, student)

    teacher = None
    if teacher_folder is not None and (recipe.distill_weight or recipe.hidden_weight):
        cache = open_cache(recipe, teacher_folder, stream, objective, vocab_size)
        teacher = open_teacher(recipe, teacher_folder, cache, encoder_decoder)
        apart = teacher.loaded is None or not getattr(objective, "isolate", False)
        if not (apart or keeps_documents_apart(teacher.loaded)):
            facts.append("note: the teacher does not keep documents apart, and sees across their borders")
    lines = [*budget.explain(), *choices, *facts, *_stream_lines(stream, recipe, budget)]
    lines.append(f"result: {recipe.output / states.MODEL_FOLDER}")
    if state is not None:
        lines.append(f"resuming from step {state['step']} of {budget.steps}: {state_folder}")
    job = Job(
        recipe=recipe,
        digest=digest,
        source=source,
        student=student,
        objective=objective,
        stream=stream,
        converted=_converted(source, teacher_folder),
        teacher_folder=teacher_folder,
        teacher=teacher,
        held_out=held_out,
        budget=budget,
        lines=lines,
        state_folder=state_folder,
        state=state,
    )
    _ = job.arguments  # checks the device
    return job


def _objective(recipe: Recipe, tokenizer: Any, student: Any) -> tuple[Objective, list[str]]:
    """The objective, and notes on it for a person.

    Raises:
        RegroupError: documents are to be kept apart, and this model cannot do that.
    """
    causal = recipe.objective == "causal"
    isolate = False
    facts = []
    packed = causal and recipe.windows == "packed"
    if packed and not recipe.cross_documents and recipe.isolate is not False:
        isolate = keeps_documents_apart(student)
        if recipe.isolate and not isolate:
            raise RegroupError(
                "this model cannot keep packed documents apart",
                expected="attention that sees position_ids begin again",
                remedy="leave isolate out of the recipe: the loss still does not cross borders",
            )
        facts.append(
            "documents in a window do not attend to each other"
            if isolate
            else "documents in a window attend to each other, which this family cannot prevent; no loss crosses borders"
        )
    start = None
    if not causal:
        start = student.generation_config.decoder_start_token_id
        start = student.config.decoder_start_token_id if start is None else start
    made = make_objective(
        recipe.objective,
        tokenizer,
        window=recipe.window,
        start_token=start,
        max_target=recipe.max_target,
        cross_documents=recipe.cross_documents,
        isolate=isolate,
        documents=causal and not packed,
    )
    return made, facts


def _held_out_batches(
    recipe: Recipe, tokenizer: Any, objective: Objective, vocab_size: int, teacher: Path | None, *, dry_run: bool
) -> Iterator[Batch]:
    """Batches of the text that is evaluated on, as large as a process's share of a training batch."""
    if recipe.held_out is None:
        return
    if is_own(recipe.held_out):
        assert teacher is not None
        found = [] if dry_run else sampled.held_out_examples(recipe, teacher)
    else:
        found = held_out_examples(
            recipe.held_out, tokenizer, objective, limit=recipe.held_out_windows, vocab_size=vocab_size
        )
    size = recipe.micro_batch or max(1, recipe.batch_size // world())
    for first in range(0, len(found), size):
        batch = objective.collate(found[first : first + size])
        targets = aligned_targets(batch.pop("labels"), shifted=recipe.objective == "causal")
        yield Batch(batch, targets)


def _budget(recipe: Recipe, source: Source, student: Any, teacher_folder: Path | None) -> Budget:
    """Tokens, steps and FLOPs of the run.

    Raises:
        RegroupError: see ``plan_budget``; a teacher that cannot be opened.
    """
    known = None
    for name in (recipe.teacher, recipe.model):
        known = known or (known_pretraining_tokens(name) if name else None)
    layout = source.layout
    parameters = sum(p.numel() for p in student.parameters())
    own, teachers = _lookups(student, layout.tied_embeddings), None
    if teacher_folder is not None:
        with open_source(str(teacher_folder)) as teacher:
            teachers = teacher.layout.parameters or parameters
    return plan_budget(
        alpha=recipe.alpha,
        pretraining_tokens=recipe.pretraining_tokens or (known[0] if known else None),
        tokens=recipe.tokens,
        steps=recipe.steps,
        batch_size=recipe.batch_size,
        window=recipe.window,
        parameters=parameters,
        embedding_parameters=own,
        layers=len(layout.layers) + layout.encoder_layers,
        hidden=layout.layers[0].num_attention_heads * layout.layers[0].head_dim,
        teacher_parameters=teachers,
        teacher_embedding_parameters=own if teachers else None,
    )


def _converted(source: Source, teacher_folder: Path | None) -> tuple[str, ...]:
    """Attention modules with other key/value heads than the teacher's; without a teacher those with shared ones."""
    before = {layer.module: layer.num_attention_heads for layer in source.layout.layers}
    if teacher_folder is not None:
        with open_source(str(teacher_folder)) as teacher:
            before |= {layer.module: layer.num_key_value_heads for layer in teacher.layout.layers}
    return tuple(layer.module for layer in source.layout.layers if layer.num_key_value_heads != before[layer.module])


def _lookups(student: Any, tied: bool) -> int:
    """Weights that are looked up and not multiplied: the input embeddings, unless they are the output's."""
    head = student.get_output_embeddings()
    weight = student.get_input_embeddings().weight
    return 0 if tied or (head is not None and head.weight is weight) else weight.numel()


def _stream_lines(stream: Any, recipe: Recipe, budget: Budget) -> list[str]:
    unique = windows_of(recipe)
    if unique is not None:
        passes = budget.tokens / (unique * recipe.window)
        return [f"data: {unique * recipe.window:,} unique tokens, {passes:.3g} passes over them"]
    there = stream.estimated_tokens()
    if there is None:
        return []
    needed = budget.tokens / recipe.epochs
    line = (
        f"data: about {there:,} tokens per pass, {recipe.epochs} {'pass' if recipe.epochs == 1 else 'passes'} at most"
    )
    if there < 0.95 * needed:
        return [line, f"note: that is less than the run's {budget.tokens:,}; it ends where the data end. Raise epochs"]
    return [line]
