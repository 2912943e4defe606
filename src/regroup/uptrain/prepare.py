"""Everything that can be wrong with a run is found here, before the first step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from ..checkpoint import Checkpoint, fetch, fingerprint
from ..data import Batch
from ..errors import RegroupError
from ..models import load, load_tokenizer
from ..opening import Source, open_source
from ..processes import world
from . import states
from .budget import Budget, known_pretraining_tokens, plan_budget
from .cache import TeacherCache
from .checks import (
    check_room,
    check_sharding,
    check_window,
    checked_teacher,
    dropouts,
    is_encoder_decoder,
    state_of,
)
from .distill import aligned_targets
from .export import check_names, freeze_tables
from .job import Job, training_arguments
from .objective import Objective, keeps_documents_apart, make_objective
from .recipe import Recipe, resolved
from .stream import held_out_examples, open_stream
from .teacher import Teacher


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
    student: Any = load(begun, dtype=torch.float32, progress=False, **options)
    freeze_tables(student)
    check_names(source.checkpoint, student, values=begun == folder)
    check_window(student.config, recipe.window)
    vocab_size = student.get_input_embeddings().weight.shape[0]

    teacher_folder = checked_teacher(recipe, folder, tokenizer, student)
    objective, facts = _objective(recipe, tokenizer, student)
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
    held_out = list(_held_out(recipe, tokenizer, objective, vocab_size))
    budget = _budget(recipe, source, student, teacher_folder)
    local_steps = _local_steps(recipe, budget.steps)
    if state is not None:
        stream.load_state_dict(state["stream"])
    elif begun == local:
        _skip(stream, recipe, local_steps)
    steps = budget.steps - local_steps
    check_room(recipe, source.checkpoint, student)

    teacher = None
    if teacher_folder is not None and (recipe.distill_weight or recipe.hidden_weight):
        cache = _cache(recipe, teacher_folder, stream, objective, vocab_size)
        teacher = _teacher(recipe, teacher_folder, cache, encoder_decoder)
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


def _objective(recipe: Recipe, tokenizer: Any, student: Any) -> tuple[Objective, list[str]]:
    causal = recipe.objective == "causal"
    isolate = False
    facts = []
    if causal and not recipe.cross_documents and recipe.isolate is not False:
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
    )
    return made, facts


def _held_out(recipe: Recipe, tokenizer: Any, objective: Objective, vocab_size: int) -> Iterator[Batch]:
    if recipe.held_out is None:
        return
    found = held_out_examples(
        recipe.held_out, tokenizer, objective, limit=recipe.held_out_windows, vocab_size=vocab_size
    )
    size = recipe.micro_batch or max(1, recipe.batch_size // world())
    for first in range(0, len(found), size):
        batch = objective.collate(found[first : first + size])
        targets = aligned_targets(batch.pop("labels"), shifted=recipe.objective == "causal")
        yield Batch(batch, targets)


def _budget(recipe: Recipe, source: Source, student: Any, teacher_folder: Path | None) -> Budget:
    known = None
    for name in (recipe.teacher, recipe.model):
        known = known or (known_pretraining_tokens(name) if name else None)
    layout = source.layout
    parameters = sum(p.numel() for p in student.parameters())
    own, teachers = _lookups(student, layout.tied_embeddings), None
    if teacher_folder is not None:
        with open_source(str(teacher_folder)) as parent:
            teachers = parent.layout.parameters or parameters
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


def _lookups(student: Any, tied: bool) -> int:
    """Weights that are looked up and not multiplied: the input embeddings, unless they are the output's."""
    head = student.get_output_embeddings()
    weight = student.get_input_embeddings().weight
    return 0 if tied or (head is not None and head.weight is weight) else weight.numel()


def _local_steps(recipe: Recipe, steps: int) -> int:
    if "local" not in recipe.stages:
        return 0
    share = round(steps * recipe.local_share) if "logit" in recipe.stages else steps
    if share < 2:
        raise RegroupError(
            "the local stage needs two batches at least, one to judge on",
            got=f"{share} of {steps} steps",
            remedy="give the run more tokens, or a larger local_share in the recipe",
        )
    return share


def _skip(stream: Any, recipe: Recipe, steps: int) -> None:
    """Move a stream past the examples of the local stage."""
    batches = stream.batches(recipe.batch_size)
    for _ in range(steps):
        next(batches, None)
    batches.close()


def _cache(recipe: Recipe, parent: Path, stream: Any, objective: Objective, vocab_size: int) -> TeacherCache | None:
    if recipe.teacher_cache is None:
        return None
    if recipe.top_k is None:
        raise RegroupError(
            "the teacher's cache keeps the largest logits alone",
            expected="how many, beside --teacher-cache",
            remedy="add --top-k 32 or so",
        )
    most = recipe.window if recipe.objective == "causal" else recipe.max_target or recipe.window
    if recipe.objective == "span-corruption":
        most = recipe.window  # targets are shorter than inputs
    facts = {
        **stream.state_dict()["of"],
        "epochs": recipe.epochs,
        "teacher": fingerprint(parent),
        "temperature": recipe.temperature,
    }
    return TeacherCache(recipe.teacher_cache, facts, k=recipe.top_k, positions=most, vocabulary=vocab_size)


def _teacher(recipe: Recipe, parent: Path, cache: TeacherCache | None, encoder_decoder: bool) -> Teacher:
    vocabulary = None

    def loaded() -> Any:
        device = _device(recipe)
        model: Any = load(parent, dtype="auto", progress=False)
        if device.type == "cpu" and model.dtype == torch.float16:
            model = model.float()  # CPUs compute float16 several times slower, and no better
        if bool(model.config.is_encoder_decoder) != encoder_decoder:
            raise RegroupError("the teacher is another kind of model", file=parent)
        model.config.use_cache = False
        return model.to(device)

    if recipe.top_k is not None:
        from ..checkpoint.reader import read_json

        vocabulary = int(read_json(parent / "config.json")["vocab_size"])
        if recipe.top_k >= vocabulary:
            raise RegroupError("there are not that many tokens", expected=f"below {vocabulary}", got=recipe.top_k)
    teacher = Teacher(
        loaded, k=recipe.top_k, temperature=recipe.temperature, cache=cache, hidden=bool(recipe.hidden_weight)
    )
    if cache is None:
        with contextlib.suppress(AttributeError):
            _ = teacher.model  # now, so that a teacher that does not load is refused before the first step
    return teacher


def _device(recipe: Recipe) -> torch.device:
    from accelerate import PartialState

    if recipe.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device(PartialState().device or "cuda")


def _stream_lines(stream: Any, recipe: Recipe, budget: Budget) -> list[str]:
    there = stream.estimated_tokens()
    if there is None:
        return []
    needed = budget.tokens / recipe.epochs
    line = f"data: about {there:,} tokens a pass, {recipe.epochs} {'pass' if recipe.epochs == 1 else 'passes'} at most"
    if there < 0.95 * needed:
        return [line, f"note: that is less than the run's {budget.tokens:,}; it ends where the data end. Raise epochs"]
    return [line]
