"""The second half of the demonstration: two converted models, uptrained with the paper's recipe and with ours."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..progress import stage
from ..uptraining.listener import Listener
from ..uptraining.recipe import Recipe
from ..uptraining.run import uptrain

ALPHA = 0.05  # of the original model's training tokens, as in Ainslie et al. 2023, section 3.1
BATCH = 8
POINTS = 10
HELD_OUT_WINDOWS = 32


@dataclass(frozen=True)
class Way:
    """How a converted model is uptrained.

    Attributes:
        name: for table and figure.
        start: how the model was converted, one of ``demo.run.METHODS``.
        distilled: whether the original model is the teacher; otherwise it is trained on cross-entropy.
        learning_rate: the highest; chosen for each way in ``benchmarks/records/uptraining-demo.json``.
    """

    name: str
    start: str
    distilled: bool
    learning_rate: float


WAYS = (
    Way("paper's recipe", "mean", False, 0.002),
    Way("ours, distilled", "auto + text", True, 0.001),
)


@dataclass(frozen=True)
class Texts:
    """Three files of JSON lines that hold different modules of the standard library."""

    calibration: Path
    training: Path
    held_out: Path


def divide(
    folder: Path,
    training: Iterable[tuple[str, str]],
    held_out: Iterable[tuple[str, str]],
    count: Callable[[str], int],
    calibration_tokens: int,
) -> Texts:
    """Write the demonstration's text: training modules up to ``calibration_tokens`` are for calibration alone.

    Args:
        folder: that is made if need be.
        training, held_out: paths and texts of modules.
        count: tokens of a text.
        calibration_tokens: at least so many.
    """
    folder.mkdir(parents=True, exist_ok=True)
    texts = Texts(*(folder / f"{name}.jsonl" for name in ("calibration", "training", "held-out")))
    first, rest, tokens = [], [], 0
    for _, text in training:
        (first if tokens < calibration_tokens else rest).append(text)
        tokens += count(text) if tokens < calibration_tokens else 0
    for path, found in ((texts.calibration, first), (texts.training, rest), (texts.held_out, [t for _, t in held_out])):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found), encoding="utf-8")
    return texts


def recover(
    way: Way, converted: Path, original: Path, texts: Texts, output: Path, *, pretraining_tokens: int, window: int
) -> dict[str, Any]:
    """Uptrain a converted model at ``ALPHA`` and return the run's record. An earlier run in ``output`` is replaced."""
    shutil.rmtree(output, ignore_errors=True)
    tokens_per_step = BATCH * window
    steps = -(-int(ALPHA * pretraining_tokens) // tokens_per_step)
    recipe = Recipe(
        model=str(converted),
        output=output,
        data=(str(texts.training),),
        alpha=ALPHA,
        pretraining_tokens=pretraining_tokens,
        teacher=str(original) if way.distilled else None,
        window=window,
        batch_size=BATCH,
        learning_rate=way.learning_rate,
        optimizer="adamw",
        windows="packed",
        held_out=str(texts.held_out),
        held_out_windows=HELD_OUT_WINDOWS,
        eval_every=max(1, steps // POINTS),
        save_every=10 * steps,
        report_to=(),
        device="cpu",
    )
    done = uptrain(recipe, listener=_Bar(f"uptraining: {way.name}"))
    assert done.record is not None
    return done.record


def points(record: dict[str, Any], pretraining_tokens: int) -> list[dict[str, float]]:
    """Held-out loss along a run: α, and nats per token on the run's own held-out windows."""
    per_step = record["configuration"]["budget"]["tokens_per_step"]
    return [
        {"alpha": entry["step"] * per_step / pretraining_tokens, "nats_per_token": entry["eval_loss"]}
        for entry in record["results"]["history"]
        if "eval_loss" in entry
    ]


def teacher_loss(record: dict[str, Any]) -> float | None:
    """The teacher's loss on the run's own held-out windows, in nats per token; None for a run without a teacher."""
    found = [entry["eval_teacher_loss"] for entry in record["results"]["history"] if "eval_teacher_loss" in entry]
    return found[-1] if found else None


class _Bar(Listener):
    def __init__(self, title: str) -> None:
        self._title = title
        self._advance: Callable[[int], None] = lambda count: None

    @contextlib.contextmanager
    def training(self, steps: int, first: int) -> Iterator[None]:
        with stage(self._title, steps, done=first, unit="steps") as self._advance:
            yield

    def step(self, number: int, loss: float, tokens_per_second: float) -> None:
        self._advance(1)
