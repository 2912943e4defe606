"""What each merge rule costs before any training: the ablations of docs/methods.md.

    python recipes/conversion_methods.py PARENT CALIBRATION HELD_OUT --kv-heads 2,1 -o record.json

The parent is converted to each G in each way and evaluated on held-out text that calibration never sees. Both texts are
JSON lines with a document in "text". Without arguments beyond these it is as deterministic as the machine's sums.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from regroup.convert.text import CalibrationText
from regroup.data import read_texts, token_windows
from regroup.evaluate import causal_batches, score
from regroup.evaluate.run import load_for_scoring
from regroup.models import load_tokenizer
from regroup.pipeline import convert_checkpoint, open_layout
from regroup.plan import make_plan
from regroup.record import record, write_record

# name, keys by, values by (None: auto), with text, repair
VARIANTS: tuple[tuple[str, str | None, str | None, bool, str], ...] = (
    ("mean (the paper's)", "mean", "mean", False, "none"),
    ("first", "first", "first", False, "none"),
    ("weights: procrustes", "procrustes", "procrustes", False, "none"),
    ("weights: lowrank", "lowrank", "lowrank", False, "none"),
    ("weights: keys procrustes, values lowrank", "procrustes", "lowrank", False, "none"),
    ("weights: keys lowrank, values procrustes (auto)", "lowrank", "procrustes", False, "none"),
    ("text: procrustes", "procrustes", "procrustes", True, "none"),
    ("text: lowrank", "lowrank", "lowrank", True, "none"),
    ("text: procrustes, output", "procrustes", "procrustes", True, "output"),
    ("text: lowrank, output", "lowrank", "lowrank", True, "output"),
    ("text: auto, output", None, None, True, "output"),
    ("text: auto, distill", None, None, True, "distill"),
)


def main(
    parent: str,
    calibration: Path,
    held_out: Path,
    kv_heads: Annotated[str, typer.Option("--kv-heads")] = "2,1",
    window: Annotated[int, typer.Option()] = 256,
    windows: Annotated[int, typer.Option()] = 64,
    tokens: Annotated[int, typer.Option(help="Calibration tokens.")] = 32_768,
    distill_tokens: Annotated[int, typer.Option(help="Calibration tokens where the layer is distilled.")] = 262_144,
    batch: Annotated[int, typer.Option()] = 8,
    distill_batch: Annotated[int, typer.Option()] = 1,
    document_starts: Annotated[bool, typer.Option("--document-starts")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    folder = Path(parent)
    layout = open_layout(parent)
    cut, _ = token_windows(
        read_texts(held_out), load_tokenizer(folder), length=window, limit=windows, document_starts=document_starts
    )
    teacher = load_for_scoring(folder, "float32", "cpu")
    base = score(teacher, causal_batches(cut, 16))
    rows: list[dict[str, Any]] = []
    for heads in map(int, kv_heads.split(",")):
        for name, keys, values, with_text, repair in VARIANTS:
            started = time.perf_counter()
            count, together = (distill_tokens, distill_batch) if repair == "distill" else (tokens, batch)
            text = CalibrationText(calibration, count, window, together) if with_text else None
            with tempfile.TemporaryDirectory() as scratch:
                child = Path(scratch) / "child"
                if keys is None or values is None:
                    convert_checkpoint(parent, child, kv_heads=heads, calibration=text, repair=repair)
                else:
                    plan = make_plan(layout, heads)
                    layers = tuple(replace(x, key_method=keys, value_method=values) for x in plan.layers)
                    plan = replace(plan, layers=layers)
                    convert_checkpoint(parent, child, plan=plan, calibration=text, repair=repair)
                seconds = time.perf_counter() - started
                result = score(load_for_scoring(child, "float32", "cpu"), causal_batches(cut, 16), teacher=teacher)
            rows.append(
                {
                    "method": name,
                    "num_key_value_heads": heads,
                    "excess_nats_per_token": result.nats_per_token - base.nats_per_token,
                    "kl_nats_per_token": result.kl_nats_per_token,
                    "standard_error": result.standard_error,
                    "calibration_tokens": count if with_text else 0,
                    "seconds": seconds,
                }
            )
            Console(stderr=True).print(f"G={heads} {name}: {rows[-1]['excess_nats_per_token']:+.3f} ({seconds:.0f} s)")
    configuration = {
        "parent": folder.name,
        "calibration": calibration.name,
        "held_out": held_out.name,
        "window": window,
        "windows": len(cut),
        "document_starts": document_starts,
    }
    value = record("conversion-methods", configuration, {"parent_nats_per_token": base.nats_per_token, "rows": rows})
    write_record(output, value)
    show(value)


def show(value: dict[str, Any]) -> None:
    rows = value["results"]["rows"]
    groups = list(dict.fromkeys(row["num_key_value_heads"] for row in rows))
    table = Table("excess nats a token", *(f"G = {heads}" for heads in groups))
    for name in dict.fromkeys(row["method"] for row in rows):
        found = [row for row in rows if row["method"] == name]
        table.add_row(name, *(f"{row['excess_nats_per_token']:+.3f}" for row in found))
    Console(stderr=True).print(table)


if __name__ == "__main__":
    typer.run(main)
