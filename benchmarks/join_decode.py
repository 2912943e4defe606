"""One record of several runs of `regroup bench decode`, for docs/benchmarks.md.

python benchmarks/join_decode.py RUN.json RUN.json -o benchmarks/records/decode-t5-large.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from regroup.record import record, write_record


def main(runs: list[Path], output: Annotated[Path, typer.Option("--output", "-o")]) -> None:
    found = [json.loads(path.read_text(encoding="utf-8")) for path in runs]
    note = {"note": "runs of regroup bench decode, one after the other"}
    write_record(output, record("benchmark/decode-runs", note, {"runs": found}))


if __name__ == "__main__":
    typer.run(main)
