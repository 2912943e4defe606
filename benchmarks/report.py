"""docs/benchmarks.md from the records: run it after a record was made anew.

python benchmarks/report.py            # rewrites the page
python benchmarks/report.py --check    # says whether the page is what the records say
"""

# ruff: noqa: E501

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from decoding_page.engines import engines, engines_avx2
from decoding_page.layers import linear
from decoding_page.models import llama, t5, t5_avx2, t5_xxl
from decoding_page.operator import operator, operator_avx2

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/records"
PAGE = ROOT / "docs/benchmarks.md"

SECTIONS = {
    "linear.json": linear,
    "attention-cpu.json": operator,
    "attention-cpu-avx2.json": operator_avx2,
    "decode-engines.json": engines,
    "decode-engines-avx2.json": engines_avx2,
    "decode-t5-large.json": t5,
    "decode-t5-large-avx2.json": t5_avx2,
    "decode-llama-1b.json": llama,
    "decode-t5-xxl.json": t5_xxl,
}


def page() -> str:
    """The whole page."""
    lines = [
        "# Decoding speed",
        "",
        "Results of `regroup bench` and `benchmarks/` on two machines, one with AVX-512 and one without, without GPUs.",
        "`python benchmarks/report.py` writes this page from their records (`benchmarks/records/`). The floor of a step is",
        "the larger of two times: the bytes that it reads divided by the read bandwidth, and its FLOPs divided by the rate of",
        "a matrix product of that shape. Both are measured in turns with the compared programs, because memory is shared",
        "with other virtual machines and its speed changes within minutes. So compare ratios, not milliseconds of different",
        "runs.",
        "",
    ]
    for name, section in SECTIONS.items():
        if (RECORDS / name).exists():
            lines += section(json.loads((RECORDS / name).read_text(encoding="utf-8")))
    return "\n".join(lines).rstrip() + "\n"


def main(check: Annotated[bool, typer.Option("--check")] = False) -> None:
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print("docs/benchmarks.md differs from the records; run python benchmarks/report.py", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
