"""``regroup uptrain`` as one function: check everything, say what will be done, train, write the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..devices import on_cpu
from ..errors import RegroupError
from ..extras import require
from ..processes import barrier, errors_shared, rank, world
from ..record import record, write_record
from ..safe_text import code_span, visible
from . import states
from .budget import Budget
from .export import write_model
from .job import Job
from .learning import NothingLearnedError, check_changed, sample
from .listener import Listener, Progress, curve
from .own_text import is_own
from .prepare import prepare
from .recipe import Recipe
from .trainer import UptrainTrainer


@dataclass(frozen=True)
class Result:
    """The outcome of a run.

    Attributes:
        recipe: with nothing left open.
        budget: of the whole run.
        lines: the arithmetic and the choices, as they were printed.
        model: folder of the finished checkpoint, or None after a dry run.
        record: see ``regroup.record``, or None after a dry run.
        resumed_from: the step that the run continued from, or None.
        finished_before: whether an earlier call had finished it, and nothing was done now.
    """

    recipe: Recipe
    budget: Budget
    lines: list[str]
    model: Path | None = None
    record: dict[str, Any] | None = None
    resumed_from: int | None = None
    finished_before: bool = False


def uptrain(recipe: Recipe, *, listener: Listener | None = None, dry_run: bool = False) -> Result:
    """Continue the pre-training of a converted checkpoint.

    ``recipe.output`` becomes ``model/`` (the finished checkpoint, in the form of ``recipe.model``), ``checkpoint-N/``
    (states to resume from), ``logs/`` (TensorBoard), ``record.json``, ``curve.png`` and ``run.json``. A run that was
    broken off resumes from its newest complete state when it is given the same recipe and output again; one that is
    finished is not done again.

    In a process group (``torchrun``, ``accelerate launch``) every process calls this function; the first one writes.

    Args:
        recipe: what to do.
        listener: informed of its progress, in the first process.
        dry_run: check everything, train and write nothing.

    Raises:
        RegroupError: anything wrong, as far as possible before the first step; the loss breaks down; the disk is full.
    """
    require("train", "accelerate", "matplotlib", *({"tensorboard"} & {*recipe.report_to}))
    _join(recipe)
    if listener is None or rank() > 0:
        listener = Listener()
    with ExitStack() as lock:
        with listener.stage("checking the recipe, the model and the data"), errors_shared():
            # Before anything in the folder is read: the states of a run in progress come and go.
            begun = (recipe.output / states.RUN_FILE).is_file()
            if begun and not dry_run and rank() == 0:
                lock.enter_context(states.locked(recipe.output / states.RUN_FILE))
            job = prepare(recipe, dry_run=dry_run)
        listener.planned(job.lines)
        if dry_run:
            return Result(job.recipe, job.budget, job.lines)
        finished = job.recipe.output / states.MODEL_FOLDER
        if finished.exists():
            listener.notice(f"the run is finished already, and nothing is done now: {finished}")
            value = json.loads((job.recipe.output / "record.json").read_text(encoding="utf-8"))
            return Result(job.recipe, job.budget, job.lines, finished, value, job.step, finished_before=True)
        with errors_shared():
            if rank() == 0:
                if not begun:
                    run = {"format": 1, "digest": job.digest, "recipe": job.recipe.to_json()}
                    lock.enter_context(states.begun(job.recipe.output, run))
                states.clean(job.recipe.output)
        try:
            trainer = _trained(job, listener)
        except NothingLearnedError:
            if rank() == 0:
                states.forget(job.recipe.output)
            raise
        return _finish(job, trainer)


def _join(recipe: Recipe) -> None:
    """Join the process group that the launcher asks for, so that the processes can agree from the start."""
    from accelerate import PartialState

    if world() > 1 and not torch.distributed.is_initialized():
        cpu = on_cpu(recipe.device)
        PartialState(cpu=cpu, **({"backend": "gloo"} if cpu else {}))


def _trained(job: Job, listener: Listener) -> UptrainTrainer:
    """Train to the end, from the newest state if there is one."""
    trainer = UptrainTrainer(job)
    state = job.state
    if state is not None:
        trainer.guard.load_state_dict(state["guard"])
        trainer.seconds_before = state["seconds"]
    trainer.add_callback(Progress(trainer, listener, job.budget.tokens_per_step))
    first = job.step or 0
    if state is not None and (first >= job.budget.steps or state["data_ended"]):
        # Broken off between the last state and the finished model.
        from transformers import TrainerState

        assert job.state_folder is not None
        trainer.state = TrainerState.load_from_json(str(job.state_folder / "trainer_state.json"))
        trainer.data_ended = state["data_ended"]
        return trainer
    trainer.begin()
    before = [] if trainer.is_fsdp_enabled else sample(job.student)
    try:
        with listener.training(job.budget.steps, first):
            trainer.train(resume_from_checkpoint=None if job.state_folder is None else str(job.state_folder))
    except torch.OutOfMemoryError as error:
        raise RegroupError(
            "the device has too little memory",
            got=str(error).splitlines()[0][:200],
            remedy="choose a smaller --micro-batch, or add --gradient-checkpointing",
        ) from error
    if trainer.state.global_step == 0:
        raise NothingLearnedError(
            "the data ended before the first step",
            file=", ".join(job.recipe.data),
            expected=f"{job.recipe.batch_size} examples",
            remedy="give more data, or more epochs in the recipe",
        )
    if first == 0 and not trainer.learned:
        raise NothingLearnedError("no token carried loss", file=", ".join(job.recipe.data), got="masked labels alone")
    if first == 0 and not trainer.is_fsdp_enabled:
        check_changed(before, job.student, trainer.state.global_step)
    if trainer.data_ended:
        listener.notice(f"the data ended after step {trainer.state.global_step} of {job.budget.steps}: raise epochs")
    return trainer


def _finish(job: Job, trainer: UptrainTrainer) -> Result:
    """Record, figure, and at last the model: where it is, everything is."""
    recipe, output = job.recipe, job.recipe.output
    state: Any = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    value = _record(job, trainer)
    with errors_shared():
        if rank() == 0:
            write_record(output / "record.json", value)
            title = f"{Path(recipe.model).name}: {trainer.state.global_step:,} steps"
            curve(output / "curve.png", trainer.state.log_history, job.budget.tokens_per_step, title)
            write_model(
                job.checkpoint,
                job.student if state is None else trainer.accelerator.unwrap_model(trainer.model),
                output / states.MODEL_FOLDER,
                state=state,
                note=_note(job, value["results"]),
            )
    barrier()
    return Result(recipe, job.budget, job.lines, output / states.MODEL_FOLDER, value, job.step)


def _record(job: Job, trainer: UptrainTrainer) -> dict[str, Any]:
    budget, history = job.budget, trainer.state.log_history
    steps = trainer.state.global_step
    tokens = steps * budget.tokens_per_step
    teacher = job.teacher
    computed = 1.0
    if teacher is not None and teacher.rows_read:
        computed = teacher.rows_computed / (teacher.rows_computed + teacher.rows_read)
    student_flops = tokens * budget.student_flops_per_token
    teacher_flops = round(tokens * budget.teacher_flops_per_token * computed)
    results = {
        "steps": steps,
        "tokens": tokens,
        "alpha": tokens / budget.pretraining_tokens if budget.pretraining_tokens else None,
        "student_flops": student_flops,
        "teacher_flops": teacher_flops,
        "flops": student_flops + teacher_flops,
        "seconds": trainer.seconds,
        "tokens_per_second": tokens / max(trainer.seconds, 1e-9),
        "data_ended": trainer.data_ended,
        "epochs_begun": job.stream.epoch + 1,
        **_unique(job),
        "spikes": trainer.guard.spikes,
        "largest_spike": trainer.guard.largest,
        **_ends(history, "cross_entropy"),
        **_ends(history, "kl"),
        **_ends(history, "eval_loss"),
        **_ends(history, "eval_kl"),
        "resumed_from": job.step,
        "history": [_entry(entry) for entry in history if "loss" in entry or "eval_loss" in entry],
    }
    configuration = {
        **job.recipe.to_json(),
        "digest": job.digest,
        "processes": world(),
        "budget": {name: getattr(budget, name) for name in ("tokens", "steps", "tokens_per_step", "alpha")},
    }
    return record("uptrain", configuration, results)


def _unique(job: Job) -> dict[str, Any]:
    """How many of the tokens were seen for the first time, and what the teacher wrote."""
    stream, window = job.stream, job.recipe.window
    examples = stream.examples if stream.pass_examples is None else min(stream.examples, stream.pass_examples)
    found: dict[str, Any] = {"unique_tokens": examples * window, "passes": stream.examples / max(1, examples)}
    if stream.own is not None:
        mixed = sum(1 for source in job.recipe.data if not is_own(source)) > 0
        own = -(-examples // 2) if mixed else examples
        found["own_text"] = {"tokens": own * window, "sha256": stream.own.digest(own), "seed": stream.own.seed}
    return found


def _ends(history: list[dict[str, float]], key: str) -> dict[str, float]:
    values = [entry[key] for entry in history if key in entry]
    return {f"first_{key}": values[0], f"last_{key}": values[-1]} if values else {}


def _entry(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) if name != "step" else value for name, value in entry.items()}


def _note(job: Job, results: Mapping[str, Any]) -> str:
    """Markdown for the model card."""
    recipe, budget = job.recipe, job.budget
    how = f"distilled from {code_span(visible(Path(recipe.teacher).name))}" if recipe.teacher else "on cross-entropy"
    share = f", α = {results['alpha']:.3g} of the original model's pre-training" if results["alpha"] else ""
    lines = [
        "## Uptraining",
        "",
        f"Uptrained by regroup (`regroup-gqa`) on {results['tokens']:,} tokens{share}, {how}: "
        f"{results['steps']:,} steps of {budget.tokens_per_step:,} tokens, {recipe.optimizer}, {recipe.schedule} rate "
        f"{recipe.learning_rate:g}, seed {recipe.seed}. Recipe: `{job.digest}`.",
    ]
    if "last_eval_loss" in results:
        before, after = results["first_eval_loss"], results["last_eval_loss"]
        lines.append(f"Held-out loss: {before:.4f} nats per token before, {after:.4f} after.")
    return "\n".join(lines) + "\n"
