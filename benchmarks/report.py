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
        "# How fast decoding is",
        "",
        "Figures of two machines, one with AVX-512 and one without, by `regroup bench` and `benchmarks/`; this page is made",
        "from their records (`benchmarks/records/`) by `python benchmarks/report.py`. The floor of a step is the larger",
        "of the bytes that it reads over the bandwidth of reading, and of its FLOPs over the rate of a matrix product of",
        "that shape, both measured in turns with what is compared: memory is shared with other machines, and its speed",
        "changes within minutes. Ratios count, and not milliseconds of different runs. There was no GPU.",
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
        print("docs/benchmarks.md is not what the records say; run python benchmarks/report.py", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
