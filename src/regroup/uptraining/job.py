"""One run: its parts, each process's share of its data, and the arguments of the Trainer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from ..checkpoint import Checkpoint
from ..data import Batch
from ..devices import on_cpu
from ..errors import RegroupError
from ..opening import Source
from ..processes import rank, world
from .budget import Budget
from .objective import Objective
from .recipe import Recipe
from .stream import ExampleStream
from .teacher import Teacher

# The newer name of the same thing.
_CHECKPOINTING = "activation_checkpointing"
if _CHECKPOINTING not in {field.name for field in fields(TrainingArguments)}:
    _CHECKPOINTING = "gradient_checkpointing"


@dataclass
class Job:
    """One run, checked as far as it can be without taking a step.

    Attributes:
        recipe: with nothing left open.
        digest: of the recipe.
        source: the checkpoint that is trained, and whose form the result gets.
        student: its model, on the CPU, in float32.
        objective: makes examples and batches of text.
        stream: positioned where the run begins or continues.
        converted: paths of the attention modules that have other heads than the original model's, below the base model.
        teacher_folder, teacher: or None; the teacher is None too where no loss asks for one.
        held_out: batches to evaluate on; none for no evaluation.
        budget: of the whole run.
        lines: for a person: what the run does, and why.
        state_folder, state: to continue from, or None.
    """

    recipe: Recipe
    digest: str
    source: Source
    student: Any
    objective: Objective
    stream: ExampleStream
    converted: tuple[str, ...]
    teacher_folder: Path | None
    teacher: Teacher | None
    held_out: list[Batch]
    budget: Budget
    lines: list[str]
    state_folder: Path | None
    state: dict[str, Any] | None

    @property
    def checkpoint(self) -> Checkpoint:
        return self.source.checkpoint

    @property
    def step(self) -> int | None:
        """The step that the run continues from, or None."""
        return None if self.state is None else int(self.state["step"])

    @cached_property
    def arguments(self) -> TrainingArguments:
        """Of the Trainer."""
        arguments = training_arguments(self.recipe, self.budget.steps)
        arguments.eval_on_start = bool(self.held_out) and self.state is None
        # Looking for parameters that a step did not use costs time, and only dropped layers leave any.
        dropped = ("layerdrop", "encoder_layerdrop", "decoder_layerdrop")
        arguments.ddp_find_unused_parameters = any(getattr(self.student.config, name, 0) for name in dropped)
        return arguments


class MicroBatches:
    """This process's share of every step, in pieces, each with the numbers of its examples in the global order.

    It is not a DataLoader: accelerate would wrap one, fetch ahead of the optimizer and split batches that are split
    already. So what was delivered is what was trained on, and the stream's place is the run's.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def __iter__(self) -> Iterator[dict[str, Any]]:
        recipe, stream = self.job.recipe, self.job.stream
        micro, pieces = pieces_of(recipe)
        before = stream.examples
        for number, batch in enumerate(stream.batches(recipe.batch_size, rank(), world(), micro_batch=micro)):
            step, piece = divmod(number, pieces)
            first = before + step * recipe.batch_size + rank() + world() * piece * micro
            rows = len(batch["labels"])
            yield {**batch, "numbers": [first + world() * row for row in range(rows)]}


def pieces_of(recipe: Recipe) -> tuple[int, int]:
    """Rows that a process computes at once, and how many times it does so in a step."""
    share = recipe.batch_size // world()
    micro = min(recipe.micro_batch or share, share)
    return micro, math.ceil(share / micro)


def training_arguments(recipe: Recipe, steps: int) -> TrainingArguments:
    """The Trainer's own settings for ``steps`` steps of a recipe."""
    micro, pieces = pieces_of(recipe)
    every = max(1, steps // 10)
    if recipe.device not in (None, "cpu", "cuda"):
        raise RegroupError(
            "uptraining runs on the CPU or on the GPUs that there are",
            expected="cpu or cuda",
            got=recipe.device,
            remedy="choose GPUs with CUDA_VISIBLE_DEVICES",
        )
    extra: dict[str, Any] = {_CHECKPOINTING: True} if recipe.gradient_checkpointing else {}
    if recipe.fsdp:
        extra |= {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
    arguments = TrainingArguments(
        output_dir=str(recipe.output),
        max_steps=steps,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=pieces,
        learning_rate=recipe.learning_rate or 0.0,
        weight_decay=recipe.weight_decay or 0.0,
        adam_beta1=recipe.betas[0],
        adam_beta2=recipe.betas[1],
        max_grad_norm=recipe.clip_norm,
        seed=recipe.seed,
        bf16=recipe.dtype == "bfloat16",
        fp16=recipe.dtype == "float16",
        torch_compile=recipe.compile,
        use_cpu=on_cpu(recipe.device),
        ddp_backend="gloo" if on_cpu(recipe.device) and world() > 1 else None,
        logging_steps=recipe.log_every,
        logging_first_step=True,
        # A loss that is not a number has to be seen, not averaged away.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if recipe.held_out else "no",
        eval_steps=recipe.eval_every or every,
        save_strategy="steps",
        save_steps=recipe.save_every or every,
        report_to=list(recipe.report_to) or "none",
        disable_tqdm=True,
        log_level="warning",
        # The stream knows its position itself.
        ignore_data_skip=True,
        remove_unused_columns=False,
        **extra,
    )
    # Several GPUs and one process would be DataParallel; it is torchrun that uses them all.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments
