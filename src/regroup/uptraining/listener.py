"""What people see of a run: a progress bar, and a curve at the end."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import progress
from ..files import replacing

if TYPE_CHECKING:
    from .trainer import UptrainTrainer


class Listener:
    """Is informed of the progress of a run, in the first process; this one does nothing with it."""

    def planned(self, lines: Sequence[str]) -> None:
        """Everything is checked, and this is what will be done."""

    def notice(self, text: str) -> None:
        """Something worth knowing."""

    def stage(
        self, title: str, total: int | None = None, unit: str = ""
    ) -> contextlib.AbstractContextManager[progress.Progress]:
        """Around work before and after the training: something to call with the amount that was just done."""
        return contextlib.nullcontext(progress.Progress(title, total))

    def training(self, steps: int, first: int) -> contextlib.AbstractContextManager[None]:
        """Around the training, which goes from step ``first`` to ``steps``."""
        return contextlib.nullcontext()

    def step(self, number: int, loss: float, tokens_per_second: float) -> None:
        """A step is done."""

    def evaluated(self, step: int, results: Mapping[str, float]) -> None:
        """Held-out text was evaluated."""

    def saved(self, step: int) -> None:
        """A state is complete."""


class ConsoleListener(Listener):
    """Shows a run on standard error: a bar with loss, speed and time left, and a line for each evaluation."""

    def __init__(self) -> None:
        from ..screen import Screen

        self.console = Screen(stderr=True)
        self._progress: progress.Progress | None = None

    def planned(self, lines: Sequence[str]) -> None:
        for line in lines:
            self.console.print(line)

    def notice(self, text: str) -> None:
        self.console.print(f"note: {text}")

    def stage(
        self, title: str, total: int | None = None, unit: str = ""
    ) -> contextlib.AbstractContextManager[progress.Progress]:
        return progress.stage(title, total, unit=unit)

    @contextlib.contextmanager
    def training(self, steps: int, first: int) -> Iterator[None]:
        with progress.stage("uptraining", steps, done=first, unit="steps") as self._progress:
            yield
        self._progress = None

    def step(self, number: int, loss: float, tokens_per_second: float) -> None:
        if self._progress is not None:
            said = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
            self._progress(number - self._progress.done, said)

    def evaluated(self, step: int, results: Mapping[str, float]) -> None:
        names = {"eval_loss": "held-out", "eval_kl": "KL to the teacher", "eval_teacher_loss": "the teacher's"}
        said = ", ".join(f"{name} {results[key]:.4f}" for key, name in names.items() if key in results)
        self.console.print(f"step {step}: {said} nats per token")


class Progress(TrainerCallback):
    """Passes on to a listener what the Trainer does."""

    def __init__(self, trainer: UptrainTrainer, listener: Listener, tokens_per_step: int) -> None:
        self._trainer, self._listener, self._tokens = trainer, listener, tokens_per_step
        self._first = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._first = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        seconds = self._trainer.seconds - self._trainer.seconds_before
        rate = (state.global_step - self._first) * self._tokens / max(seconds, 1e-9)
        self._listener.step(state.global_step, self._trainer.last_loss, rate)
        # The end of a curve is what people look at.
        control.should_log = control.should_log or state.global_step >= state.max_steps

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._listener.evaluated(state.global_step, kwargs.get("metrics", {}))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._listener.saved(state.global_step)


def curve(path: Path, history: Sequence[Mapping[str, float]], tokens_per_step: int, title: str) -> None:
    """A figure of the losses against tokens.

    Args:
        path: a PNG.
        history: entries of the Trainer's log.
        tokens_per_step: see ``Budget``.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))

    def line(key: str) -> list[tuple[float, float]]:
        return [(entry["step"] * tokens_per_step, entry[key]) for entry in history if key in entry]

    drawn = (
        ("cross_entropy", "cross-entropy", "C0", ""),
        ("eval_loss", "held-out cross-entropy", "C1", "o"),
        ("kl", "KL to the teacher", "C2", ""),
        ("eval_kl", "held-out KL to the teacher", "C3", "o"),
    )
    for key, name, colour, marker in drawn:
        points = line(key)
        if points:
            above.plot(*zip(*points, strict=True), label=name, color=colour, marker=marker, markersize=4, linewidth=1.3)
    teacher = [entry["eval_teacher_loss"] for entry in history if "eval_teacher_loss" in entry]
    if teacher:
        above.axhline(teacher[-1], color="grey", linestyle="--", linewidth=1, label="the teacher, held-out")
    above.set_ylabel("nats per token")
    above.set_title(title, fontsize=10)
    above.grid(alpha=0.3)
    above.legend(fontsize=8)
    rates = line("learning_rate")
    if rates:
        below.plot(*zip(*rates, strict=True), color="C4", linewidth=1.3)
    below.set_ylabel("learning rate")
    below.set_xlabel("tokens")
    below.grid(alpha=0.3)
    with replacing(path) as stage:
        figure.savefig(stage, format="png", dpi=130)
