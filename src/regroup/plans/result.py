"""What a conversion found on the way: groupings, methods chosen on text, and what each layer lost."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import parse_json, read_once
from .plan import Plan

# In a converted model: what was asked for, and what was found.
PLAN_FILE = "regroup_plan.json"
RESULT_FILE = "regroup_result.json"
FORMAT = "regroup-result/1"


@dataclass(frozen=True)
class Result:
    """What was found while a plan was carried out.

    Attributes:
        plan: with every method and every order spelled out. It leads to the same weights only together with the
            statistics that were taken from text; what reproduces the model is the plan that was asked for.
        calibration: what calibration measured (see ``calibration.Calibrated.to_json``); None without text.
    """

    plan: Plan
    calibration: dict[str, Any] | None = None

    def dumps(self) -> str:
        """The result as JSON."""
        values = {"format": FORMAT, "plan": json.loads(self.plan.dumps()), "calibration": self.calibration}
        return json.dumps(values, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Result:
        """Read a result.

        Raises:
            RegroupError: unreadable, or of another format.
        """
        try:
            data = parse_json(read_once(path))
        except OSError as error:
            raise RegroupError("the result cannot be read", file=path, got=error.strerror or str(error)) from error
        except (ValueError, RecursionError) as error:
            raise RegroupError("the result cannot be read", file=path, got=str(error)[:200]) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RegroupError(
                "this is not a result that this version understands",
                file=path,
                expected=f'"format": "{FORMAT}"',
                remedy="convert the model again",
            )
        calibration = data.get("calibration")
        if calibration is not None and not isinstance(calibration, dict):
            raise RegroupError("the record of calibration is no JSON object", file=path, got=repr(calibration)[:120])
        return cls(Plan.from_json(data.get("plan"), path), calibration)


def found_plan(folder: Path, given: Path | None = None) -> tuple[Plan, bool]:
    """The plan that a converted model should be the result of, and whether its weights were solved on text.

    Args:
        folder: of the converted model.
        given: another plan than the one in the folder. If what was found is an answer to it, that counts.

    Raises:
        RegroupError: the plan or the result cannot be read, or the folder's own do not belong together.
    """
    path = folder / RESULT_FILE
    result = Result.load(path) if path.exists() else None
    if given is None and not (folder / PLAN_FILE).exists():
        raise RegroupError(
            "the folder holds no plan to compare it with", file=folder / PLAN_FILE, remedy="pass the plan by --plan"
        )
    asked = Plan.load(folder / PLAN_FILE if given is None else given)
    # Older releases wrote what they found into the plan, and what calibration measured into a file of its own.
    calibrated = (folder / "regroup_calibration.json").exists() if result is None else result.calibration is not None
    if result is not None and _answers(result.plan, asked):
        return result.plan, calibrated
    if result is not None and given is None:
        raise RegroupError(
            "the result is not one of the plan next to it",
            file=path,
            expected=f"what {PLAN_FILE} asks for: heads, methods, orders and seed",
            remedy="restore the two files, or pass the plan by --plan",
        )
    return asked, calibrated or asked.calibration is not None


def _answers(found: Plan, asked: Plan) -> bool:
    """Whether what was found is what was asked for, in everything that the request did not leave open."""
    # Predictions are measured, and not asked for.
    settled = {"grouping": None, "calibration": None, "repair": None, "predicted_kl": found.predicted_kl}
    if replace(found, layers=()) != replace(asked, layers=(), **settled):
        return False
    return len(found.layers) == len(asked.layers) and all(
        one
        == replace(
            want,
            key_method=one.key_method if want.key_method == "auto" else want.key_method,
            value_method=one.value_method if want.value_method == "auto" else want.value_method,
            query_order=one.query_order if want.query_order is None else want.query_order,
            predicted_kl=one.predicted_kl,
        )
        for one, want in zip(found.layers, asked.layers, strict=True)
    )
