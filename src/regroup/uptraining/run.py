"""``regroup uptrain`` as one function: check everything, say what will be done, train, write the result."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.writer import write_text
from ..errors import RegroupError
from ..extras import require
from ..processes import barrier, errors_shared, rank, world
from ..record import record, write_record
from ..safe_text import code_span, visible
from . import states
from .budget import Budget
from .enough import NothingLearntError, check_changed, sample
from .export import write_model
from .prepare import Prepared, prepare
from .recipe import Recipe
from .trainer import UptrainTrainer
from .watch import Listener, Progress, curve


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        recipe: with nothing left open.
        budget: of the whole run.
        lines: the arithmetic and the choices, as they were shown.
        model: folder of the finished checkpoint, or None after a dry run.
        record: see ``regroup.record``, or None after a dry run.
        resumed_from: the step that the run went on from, or None.
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
    (states to go on from), ``logs/`` (TensorBoard), ``record.json``, ``curve.png`` and ``run.json``. A run that was
    broken off goes on from its newest complete state when it is given the same recipe and output again; one that is
    finished is not done again.

    In a process group (``torchrun``, ``accelerate launch``) every process calls this alike; the first one writes.

    Args:
        recipe: what to do.
        listener: told how it goes on, in the first process.
        dry_run: check everything, train and write nothing.

    Raises:
        RegroupError: anything wrong, as far as possible before the first step; the loss breaks down; the disk is full.
    """
    require("train", "accelerate", "matplotlib", *({"tensorboard"} & {*recipe.report_to}))
    _join(recipe)
    told = (listener or Listener()) if rank() == 0 else Listener()
    with told.stage("checking the recipe, the model and the data"), errors_shared():
        ready = prepare(recipe)
    told.planned(ready.lines)
    if dry_run:
        return Result(ready.recipe, ready.budget, ready.lines)
    finished = ready.recipe.output / states.MODEL_FOLDER
    if finished.exists():
        told.notice(f"the run is finished already, and nothing is done now: {finished}")
        value = json.loads((ready.recipe.output / "record.json").read_text(encoding="utf-8"))
        return Result(ready.recipe, ready.budget, ready.lines, finished, value, ready.step, finished_before=True)
    with errors_shared():
        if rank() == 0:
            _begin(ready)
    try:
        if ready.local_steps and not ready.local_done:
            from .local import local_stage

            local_stage(ready, told)
        trainer = _trained(ready, told)
    except NothingLearntError:
        if rank() == 0:
            states.forget(ready.recipe.output)
        raise
    return _finish(ready, trainer, told)


def _join(recipe: Recipe) -> None:
    """Join the process group that the launcher asks for, so that the processes can agree from the start."""
    from accelerate import PartialState

    if world() > 1 and not torch.distributed.is_initialized():
        on_cpu = recipe.device == "cpu" or not torch.cuda.is_available()
        PartialState(cpu=on_cpu, **({"backend": "gloo"} if on_cpu else {}))


def _begin(ready: Prepared) -> None:
    output = ready.recipe.output
    output.mkdir(parents=True, exist_ok=True)
    states.clean(output)
    if not (output / states.RUN_FILE).exists():
        run = {"format": 1, "digest": ready.digest, "recipe": ready.recipe.to_json()}
        temporary = output / f".{states.RUN_FILE}"
        write_text(temporary, json.dumps(run, indent=2) + "\n")
        temporary.rename(output / states.RUN_FILE)


def _trained(ready: Prepared, told: Listener) -> UptrainTrainer:
    """Train to the end, from the newest state if there is one."""
    trainer = UptrainTrainer(ready.student, ready.job, ready.arguments)
    state = ready.state
    if state is not None:
        trainer.guard.load_state_dict(state["guard"])
        trainer.seconds_before = state["seconds"]
    trainer.add_callback(Progress(trainer, told, ready.budget.tokens_per_step))
    first = ready.step or 0
    if state is not None and (first >= ready.job.steps or state["data_ended"]):
        # Broken off between the last state and the finished model.
        from transformers import TrainerState

        assert ready.state_folder is not None
        trainer.state = TrainerState.load_from_json(str(ready.state_folder / "trainer_state.json"))
        trainer.data_ended = state["data_ended"]
        return trainer
    trainer.begin()
    before = [] if trainer.is_fsdp_enabled else sample(ready.student)
    if ready.job.steps == 0:  # the local stage was all
        if ready.job.held_out:
            trainer.evaluate()
        return trainer
    try:
        with told.training(ready.job.steps, first):
            trainer.train(resume_from_checkpoint=None if ready.state_folder is None else str(ready.state_folder))
    except torch.OutOfMemoryError as error:
        raise RegroupError(
            "the device has too little memory",
            got=str(error).splitlines()[0][:200],
            remedy="choose a smaller --micro-batch, or add --gradient-checkpointing",
        ) from error
    if trainer.state.global_step == 0:
        raise NothingLearntError(
            "the data ended before the first step",
            file=", ".join(ready.recipe.data),
            expected=f"{ready.recipe.batch_size} examples beside those of the local stage",
            remedy="give more data, or more epochs in the recipe",
        )
    if first == 0 and not trainer.learnt:
        raise NothingLearntError("no token carried loss", file=", ".join(ready.recipe.data), got="masked labels alone")
    if first == 0 and not trainer.is_fsdp_enabled:
        check_changed(before, ready.student, trainer.state.global_step)
    if trainer.data_ended:
        told.notice(f"the data ended after step {trainer.state.global_step} of {ready.job.steps}: raise epochs")
    return trainer


def _finish(ready: Prepared, trainer: UptrainTrainer, told: Listener) -> Result:
    """Record, figure, and at last the model: where it is, everything is."""
    recipe, output = ready.recipe, ready.recipe.output
    state: Any = trainer.accelerator.get_state_dict(trainer.model) if trainer.is_fsdp_enabled else None
    value = _record(ready, trainer)
    with errors_shared():
        if rank() == 0:
            write_record(output / "record.json", value)
            title = f"{Path(recipe.model).name}: {trainer.state.global_step:,} steps"
            curve(
                output / "curve.png",
                trainer.state.log_history,
                ready.budget.tokens_per_step,
                title,
                steps_before=ready.local_steps,
            )
            write_model(
                ready.checkpoint,
                ready.student if state is None else trainer.accelerator.unwrap_model(trainer.model),
                output / states.MODEL_FOLDER,
                state=state,
                note=_note(ready, value["results"]),
            )
    barrier()
    return Result(recipe, ready.budget, ready.lines, output / states.MODEL_FOLDER, value, ready.step)


def _record(ready: Prepared, trainer: UptrainTrainer) -> dict[str, Any]:
    budget, job, history = ready.budget, ready.job, trainer.state.log_history
    steps = trainer.state.global_step + ready.local_steps
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
        "spikes": trainer.guard.spikes,
        "largest_spike": trainer.guard.largest,
        **_ends(history, "cross_entropy"),
        **_ends(history, "kl"),
        **_ends(history, "eval_loss"),
        **_ends(history, "eval_kl"),
        "resumed_from": ready.step,
        "history": [_entry(entry) for entry in history if "loss" in entry or "eval_loss" in entry],
    }
    configuration = {
        **ready.recipe.to_json(),
        "digest": ready.digest,
        "processes": world(),
        "budget": {name: getattr(budget, name) for name in ("tokens", "steps", "tokens_per_step", "alpha")},
    }
    return record("uptrain", configuration, results)


def _ends(history: list[dict[str, float]], key: str) -> dict[str, float]:
    values = [entry[key] for entry in history if key in entry]
    return {f"first_{key}": values[0], f"last_{key}": values[-1]} if values else {}


def _entry(entry: Mapping[str, float]) -> dict[str, float]:
    return {name: float(value) if name != "step" else value for name, value in entry.items()}


def _note(ready: Prepared, results: Mapping[str, Any]) -> str:
    """Markdown for the model card."""
    recipe, budget = ready.recipe, ready.budget
    how = f"distilled from {code_span(visible(Path(recipe.teacher).name))}" if recipe.teacher else "on cross-entropy"
    share = f", α = {results['alpha']:.3g} of the parent's pre-training" if results["alpha"] else ""
    lines = [
        "## Uptraining",
        "",
        f"Uptrained by [regroup](https://pypi.org/project/regroup-gqa/) on {results['tokens']:,} tokens{share}, {how}: "
        f"{results['steps']:,} steps of {budget.tokens_per_step:,} tokens, {recipe.optimizer}, {recipe.schedule} rate "
        f"{recipe.learning_rate:g}, seed {recipe.seed}. Recipe: `{ready.digest}`.",
    ]
    if "last_eval_loss" in results:
        before, after = results["first_eval_loss"], results["last_eval_loss"]
        lines.append(f"Held-out loss: {before:.4f} nats a token before, {after:.4f} after.")
    return "\n".join(lines) + "\n"
