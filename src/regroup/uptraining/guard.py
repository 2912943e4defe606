"""Watching the loss: a run that has broken down stops, and says where to resume.

Ainslie et al. 2023 (appendix A) saw loss spikes in multi-query models and gave up on fine-tuning them; a spike that is
noticed after a week has cost a week.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..errors import RegroupError

# Steps whose median a loss is compared with, and how many of them there must be.
WINDOW, ENOUGH = 64, 16
# Steps above it in a row that are no longer a spike but a run that has diverged.
PATIENCE = 16
# Nats per token above the median that are never a spike: at the small losses of distillation, noise is a large factor.
SMALLEST = 0.1


class LossGuard(TrainerCallback):
    """Stops a run whose loss or gradient is not a number, or whose loss stays high; counts spikes that pass.

    A step's loss is *high* where it is above ``factor`` times the median of the last 64 losses that were not high, and
    more than 0.1 nats above it; the first 16 steps are never high. High steps in a row are one spike. After 16 of them
    the run stops. Gradients are looked at before the optimizer uses them, so weights stay as they were.

    Args:
        factor: see above; 0 counts no spikes.
        observe: gives the loss of this step, the mean over all processes, and the norm of its gradient, or None.
        last_state: gives the newest complete saved state that no spike has touched, as a path, or None.
    """

    def __init__(
        self,
        factor: float,
        observe: Callable[[], tuple[float, float | None]],
        last_state: Callable[[int | None], str | None],
    ) -> None:
        self.factor, self._observe, self._last_state = factor, observe, last_state
        self._losses: deque[float] = deque(maxlen=WINDOW)
        self.spikes = 0
        self.high = 0  # steps of the present spike
        self.began: int | None = None  # the step at which it began
        self.largest = 0.0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        loss, norm = self._observe()
        self.check(state.global_step + 1, loss, norm)

    def check(self, step: int, loss: float, norm: float | None = None) -> None:
        """Look at one step, before its weights change.

        Args:
            step: its number, from 1.
            loss: nats per token.
            norm: of the gradient.

        Raises:
            RegroupError: the run has broken down.
        """
        if not math.isfinite(loss) or (norm is not None and not math.isfinite(norm)):
            what = "loss" if not math.isfinite(loss) else "gradient"
            self._stop(f"the {what} is not a number any more", step, f"loss {loss}, norm of the gradient {norm}")
        median = statistics.median(self._losses) if len(self._losses) >= ENOUGH else math.inf
        if not self.factor or loss <= max(self.factor * median, median + SMALLEST):
            self._losses.append(loss)
            self.high, self.began = 0, None
            return
        if self.began is None:
            self.began, self.spikes = step, self.spikes + 1
        self.high += 1
        self.largest = max(self.largest, loss / median)
        if self.high >= PATIENCE:
            self._stop(
                "the loss has diverged", step, f"{loss:.4g} for {self.high} steps, after a median of {median:.4g}"
            )

    def _stop(self, what: str, step: int, got: str) -> None:
        good = self._last_state(self.began)
        raise RegroupError(
            what,
            expected=f"a loss below {self.factor:g} times its running median" if self.factor else "a finite loss",
            got=f"{got}, at step {step}",
            remedy=(f"the last good state is {good}: start from it" if good else "nothing was saved yet: start again")
            + ", under another --output, with a lower --learning-rate, a longer warm-up or a larger batch",
        )

    def state_dict(self) -> dict[str, Any]:
        """What it remembers, as plain JSON."""
        return {
            "losses": list(self._losses),
            "spikes": self.spikes,
            "high": self.high,
            "began": self.began,
            "largest": self.largest,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._losses = deque(state["losses"], maxlen=WINDOW)
        self.spikes, self.high, self.began = state["spikes"], state["high"], state["began"]
        self.largest = state["largest"]
