"""What a conversion found on the way: groupings, methods chosen on text, and what each layer lost."""

from __future__ import annotations

import json
from dataclasses import dataclass
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
        given: another plan than the one in the folder. Where it is the same request, what was found for it counts.

    Raises:
        RegroupError: the folder has neither a result nor a plan, or they cannot be read.
    """
    result = Result.load(folder / RESULT_FILE) if (folder / RESULT_FILE).exists() else None
    asked = Plan.load(folder / PLAN_FILE if given is None else given)
    # Older releases wrote what they found into the plan, and what calibration measured into a file of its own.
    calibrated = (folder / "regroup_calibration.json").exists() if result is None else result.calibration is not None
    if result is not None and (given is None or asked.digest() == Plan.load(folder / PLAN_FILE).digest()):
        return result.plan, calibrated
    return asked, calibrated or asked.calibration is not None
