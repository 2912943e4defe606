"""The steps of one target: each is done once, in the order that a person would do them in, and kept."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from recipes.uptraining_curve import best_rate

from .paired import mean_of
from .running import Kept
from .targets import Shape, Target
from .texts import Texts
from .ways import CONVERSIONS, PAPER, TRAININGS, Conversion, Training, converting, measuring, uptraining

Result = dict[str, Any]


@dataclass(frozen=True)
class Step:
    """Something to measure: its name, and what does it and returns the result."""

    name: str
    run: Callable[[], Result]


@dataclass(frozen=True)
class Bench:
    """What all steps share.

    Attributes:
        target: every number.
        texts: on what.
        original: folder of the original model.
        work: where models are kept, as long as they are needed.
        kept: where results are kept.
        choose_at: tokens at which the learning rate of the paper's recipe is chosen.
    """

    target: Target
    texts: Texts
    original: Path
    work: Path
    kept: Kept
    choose_at: int

    def steps(self, seeds: int) -> Iterator[Step]:
        """All steps: the original, every shape's conversions, then its uptraining runs, shortest first."""
        yield Step("original", self.measure_original)
        for shape in self.target.shapes:
            for seed in range(seeds):
                for way in CONVERSIONS:
                    if seed == 0 or way.seeded:
                        yield Step(self.converted_name(shape, way, seed), partial(self.convert, shape, way, seed))
        for shape in self.target.shapes:
            for tokens in self.target.tokens:
                for seed in range(seeds):
                    for training in TRAININGS:
                        name = f"{shape.name}-{training.name}-{tokens}-s{seed}"
                        yield Step(name, partial(self.train, name, shape, training, tokens, seed))

    def measure_original(self) -> Result:
        return self._once("original", lambda: {"measured": self._measured("original", self.original, None)})

    def converted_name(self, shape: Shape, way: Conversion, seed: int) -> str:
        return f"{shape.name}-{way.name}-s{seed}"

    def convert(self, shape: Shape, way: Conversion, seed: int) -> Result:
        """Convert and measure; models that uptraining starts from stay."""
        name = self.converted_name(shape, way, seed)

        def work() -> Result:
            folder, took = self.converted(shape, way, seed)
            found = {
                "shape": shape.name,
                "way": way.name,
                "tokens": 0,
                "seed": seed,
                "took": took,
                "measured": self._measured(name, folder, self.original),
            }
            if way not in {training.start for training in TRAININGS}:
                shutil.rmtree(folder)
            return found

        return self._once(name, work)

    def converted(self, shape: Shape, way: Conversion, seed: int) -> tuple[Path, dict[str, Result]]:
        """The converted model, and what its commands took."""
        name = self.converted_name(shape, way, seed)
        folder = self.work / "models" / name
        folder.parent.mkdir(parents=True, exist_ok=True)
        took = {}
        for command in converting(self.target, self.texts, self.original, folder, shape, way, seed):
            plan = command[0] == "plan"
            made = folder.with_suffix(".plan.json") if plan else folder
            took[command[0]] = self.kept.command(f"{name}-{command[0]}", ["regroup.cli", *command], made)
        return folder, took

    def train(self, name: str, shape: Shape, way: Training, tokens: int, seed: int) -> Result:
        """Uptrain and measure; the paper's recipe with the best learning rate, which is found before."""
        if way.distilled:
            return self._trained(name, shape, way, tokens, seed, None)
        rate = best_rate(list(self.target.rates), lambda rate: self._tuning_loss(shape, rate))

        def work() -> Result:
            # The run that the rate was chosen by, where the tokens are the same.
            return self._trained(f"{name}-rate-{rate:g}", shape, way, tokens, seed, rate)

        return self._once(name, work)

    def _tuning_loss(self, shape: Shape, rate: float) -> float:
        name = f"{shape.name}-{PAPER.name}-{self.choose_at}-s0-rate-{rate:g}"
        found = self._trained(name, shape, PAPER, self.choose_at, 0, rate)
        return mean_of(found["measured"]["texts"]["tuning"], "nats")

    def _trained(self, name: str, shape: Shape, way: Training, tokens: int, seed: int, rate: float | None) -> Result:
        def work() -> Result:
            start, _ = self.converted(shape, way.start, seed if way.start.seeded else 0)
            run = self.work / "runs" / name
            run.parent.mkdir(parents=True, exist_ok=True)
            command = uptraining(
                self.target, self.texts, self.original, start, run, way, tokens=tokens, seed=seed, rate=rate
            )
            took = self.kept.command(f"{name}-uptrain", ["regroup.cli", *command], run / "model")
            more = {} if way.distilled else {"tuning": self.texts.tuning}
            found = {
                "shape": shape.name,
                "way": way.name,
                "tokens": tokens,
                "seed": seed,
                "rate": rate,
                "took": {"uptrain": took},
                "measured": self._measured(name, run / "model", self.original, more),
            }
            shutil.rmtree(run)
            return found

        return self._once(name, work)

    def _measured(
        self, name: str, model: Path, teacher: Path | None, more: dict[str, Path] | None = None
    ) -> dict[str, Any]:
        output = self.kept.folder / "measured" / f"{name}.json"
        output.parent.mkdir(parents=True, exist_ok=True)
        texts = self.texts.held_out | (more or {})
        command = measuring(self.target, model, texts, output, teacher=teacher, prompts=self.target.prompts)
        self.kept.command(f"{name}-measure", ["recipes.real.measure", *command], output)
        return self.kept.load(f"measured/{name}")

    def _once(self, name: str, work: Callable[[], Result]) -> Result:
        key = f"results/{name}"
        return self.kept.load(key) if self.kept.has(key) else self.kept.save(key, work())
