"""What a run is made of, each part by its recipe: objective, budget, held-out batches, teacher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import fingerprint
from ..checkpoint.reader import read_json
from ..data import Batch
from ..devices import on_cpu
from ..errors import RegroupError
from ..modeling import load
from ..modeling.lm_head import require_head
from ..opening import Source, open_source
from ..processes import world
from .budget import Budget, known_pretraining_tokens, plan_budget
from .cache import TeacherCache
from .distill import aligned_targets
from .objective import Objective, keeps_documents_apart, make_objective
from .recipe import Recipe
from .stream import held_out_examples
from .teacher import Teacher


def objective_of(recipe: Recipe, tokenizer: Any, student: Any) -> tuple[Objective, list[str]]:
    """What is learnt from the tokens, and what of that a person should know.

    Raises:
        RegroupError: documents are to be kept apart, and this model cannot do that.
    """
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


def held_out_batches(recipe: Recipe, tokenizer: Any, objective: Objective, vocab_size: int) -> Iterator[Batch]:
    """Batches of the text that is evaluated on, as large as a process's share of a training batch."""
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


def budget_of(recipe: Recipe, source: Source, student: Any, teacher_folder: Path | None) -> Budget:
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


def local_steps_of(recipe: Recipe, steps: int) -> int:
    """How many of the steps the local stage takes.

    Raises:
        RegroupError: too few to judge on one of them.
    """
    if "local" not in recipe.stages:
        return 0
    share = round(steps * recipe.local_share) if "logit" in recipe.stages else steps
    if "logit" in recipe.stages and share >= steps:
        raise RegroupError(
            "the local stage leaves no step to the stage after it",
            got=f"{share} of {steps} steps",
            remedy="set a smaller local_share in the recipe, or ask for --stages local alone",
        )
    if share < 2:
        raise RegroupError(
            "the local stage needs two batches at least, one to judge on",
            got=f"{share} of {steps} steps",
            remedy="give the run more tokens, or a larger local_share in the recipe",
        )
    return share


def cache_of(recipe: Recipe, parent: Path, stream: Any, objective: Objective, vocab_size: int) -> TeacherCache | None:
    """Where the teacher's logits are kept, if the recipe names a place.

    Raises:
        RegroupError: nothing says how many logits, or the folder holds those of another run.
    """
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


def teacher_of(recipe: Recipe, parent: Path, cache: TeacherCache | None, encoder_decoder: bool) -> Teacher:
    """The teacher; without a cache it is loaded at once, so that one that does not load is refused here.

    Raises:
        RegroupError: another kind of model, or fewer tokens than logits are wanted.
    """
    vocabulary = None

    def loaded() -> Any:
        device = _device(recipe)
        require_head(parent)
        model: Any = load(parent, dtype="auto", progress=False)
        if device.type == "cpu" and model.dtype == torch.float16:
            model = model.float()  # CPUs compute float16 several times slower, and no better
        if bool(model.config.is_encoder_decoder) != encoder_decoder:
            raise RegroupError("the teacher is another kind of model", file=parent)
        model.config.use_cache = False
        return model.to(device)

    if recipe.top_k is not None:
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

    if on_cpu(recipe.device):
        return torch.device("cpu")
    return torch.device(PartialState().device or "cuda")
