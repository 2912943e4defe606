"""Ways to convert and to uptrain, as command lines of `regroup`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .targets import Shape, Target
from .texts import Texts


@dataclass(frozen=True)
class Conversion:
    """A way to convert.

    Attributes:
        name: in names of steps.
        title: in tables.
        method: ``--method``.
        text: ``--calibration``: ``"none"``, ``"self"``, ``"given"`` or ``"both"``.
    """

    name: str
    title: str
    method: str = "auto"
    text: str = "none"

    @property
    def seeded(self) -> bool:
        """Whether anything in it is drawn: the text that the model writes."""
        return self.text in ("self", "both")


@dataclass(frozen=True)
class Training:
    """A way to uptrain: from which conversion, on which text (as in ``Conversion``), with a teacher or without."""

    name: str
    title: str
    start: Conversion
    text: str
    distilled: bool = True


MEAN = Conversion("mean", "`mean` (the paper's)", "mean")
FIRST = Conversion("first", "`first`", "first")
NONE = Conversion("none", "`auto`, no text (`--calibration none`)")
OWN = Conversion("own", "`auto`, self-written text (the default)", text="self")
GIVEN = Conversion("given", "`auto`, given text", text="given")
BOTH = Conversion("both", "`auto`, self-written and given text, half of each", text="both")
CONVERSIONS = (MEAN, FIRST, NONE, OWN, GIVEN, BOTH)

PAPER = Training("paper", "the paper's recipe on given text: `mean`, cross-entropy", MEAN, "given", distilled=False)
TRAININGS = (
    PAPER,
    Training("distilled-given", "calibrated and distilled on given text", GIVEN, "given"),
    Training("distilled-own", "calibrated and distilled on self-written text", OWN, "self"),
    Training("distilled-both", "calibrated and distilled on both, half of each", BOTH, "both"),
)


def converting(
    target: Target, texts: Texts, original: Path, folder: Path, shape: Shape, way: Conversion, seed: int
) -> list[list[str]]:
    """Command lines of a conversion to ``folder``; a KV budget takes a plan before it."""
    text = _calibration(target, texts, way)
    asked = [*(["--method", way.method] if way.method != "auto" else []), "--seed", str(seed)]
    if shape.kv_budget is None:
        return [["convert", str(original), str(folder), "--kv-heads", str(shape.kv_heads), *asked, *text]]
    plan = str(folder.with_suffix(".plan.json"))
    return [
        ["plan", str(original), "--kv-budget", shape.kv_budget, *asked, *text, "-o", plan],
        ["convert", str(original), str(folder), "--plan", plan, *text],
    ]


def _calibration(target: Target, texts: Texts, way: Conversion) -> list[str]:
    count = target.calibration_tokens
    sizes = ["--calibration-window", str(target.calibration_window)]
    if way.text == "none":
        return ["--calibration", "none"]
    if way.text == "self":
        return ["--calibration", f"self:{count}", *sizes]
    if way.text == "both":
        return ["--calibration", f"self:{count // 2},{texts.calibration}", *sizes]
    return ["--calibration", str(texts.calibration), "--calibration-tokens", str(count), *sizes]


def uptraining(
    target: Target,
    texts: Texts,
    original: Path,
    start: Path,
    folder: Path,
    way: Training,
    *,
    tokens: int,
    seed: int,
    rate: float | None,
) -> list[str]:
    """Command line of an uptraining run in ``folder``; without a rate, with the product's."""
    return [
        *("uptrain", str(start), "--data", _data(texts, way), "-o", str(folder)),
        *(["--teacher", str(original)] if way.distilled else []),
        *("--tokens", str(tokens), "--window", str(target.training_window)),
        *("--batch-size", str(target.training_batch), "--seed", str(seed)),
        *([] if rate is None else ["--learning-rate", f"{rate:g}"]),
    ]


def _data(texts: Texts, way: Training) -> str:
    return {"given": str(texts.train), "self": "self", "both": f"self,{texts.train}"}[way.text]


def measuring(
    target: Target, model: Path, texts: dict[str, Path], output: Path, *, teacher: Path | None, prompts: Sequence[str]
) -> list[str]:
    """Command line of `measure.py`."""
    return [
        str(model),
        *(part for name, path in texts.items() for part in ("--text", f"{name}={path}")),
        *(["--teacher", str(teacher)] if teacher is not None else []),
        *("--window", str(target.window), "--windows", str(target.windows)),
        *(["--document-starts"] if target.document_starts else []),
        *(part for prompt in prompts for part in ("--prompt", prompt)),
        *("--new", str(target.new_tokens), "-o", str(output)),
    ]
