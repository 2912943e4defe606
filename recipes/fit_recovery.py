"""What `regroup advise` extrapolates with, from the records: how layers' losses add up, and what uptraining leaves.

python recipes/fit_recovery.py            # writes src/regroup/advice/recovery.json
python recipes/fit_recovery.py --check    # says whether it is what the records say
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from regroup.advice.recovery import curves_of, fit, left_out_error

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/records"
CURVES = ("uptraining-stories260k.json", "uptraining-demo.json")
LOSSES = "advise-loss.json"
FILE = ROOT / "src/regroup/advice/recovery.json"


def made() -> dict[str, Any]:
    """The fit, rounded to what it can mean."""
    models = [curves_of(json.loads((RECORDS / name).read_text(encoding="utf-8"))) for name in CURVES]
    scale, power = fit([curve for curves in models for curve in curves])
    plans = json.loads((RECORDS / LOSSES).read_text(encoding="utf-8"))["results"]["plans"]
    logs = [math.log(plan["excess_nats_per_token"] / plan["predicted_kl"]) for plan in plans]
    middle = sum(logs) / len(logs)
    return {
        "scale": round(scale),
        "power": round(power, 4),
        "error": round(left_out_error(models), 3),
        "additivity": round(math.exp(middle), 3),
        "additivity_error": round(math.exp(sum(abs(x - middle) for x in logs) / len(logs)), 3),
        "source": "benchmarks/records: " + ", ".join((*CURVES, LOSSES)),
    }


def main(check: Annotated[bool, typer.Option("--check")] = False) -> None:
    found = made()
    if check:
        same = json.loads(FILE.read_text(encoding="utf-8")) == found
        print("the fit is what the records say" if same else "the fit is not what the records say")
        sys.exit(not same)
    FILE.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    typer.run(main)
