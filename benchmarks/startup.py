"""How long the command takes to start: `regroup --help`, and `regroup inspect` of a local checkpoint.

    python benchmarks/startup.py --output benchmarks/records/startup.json

Each command is a process of its own; they take turns with an empty Python, after one round that is not counted. The
checkpoint is a small random Llama: `inspect` reads headers alone, whatever the size of the weights.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from regroup.record import record, write_record


def seconds(command: list[str]) -> float:
    """Wall time of a process that has to succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main(
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the record here.")] = None,
    runs: Annotated[int, typer.Option(min=1, help="Counted runs of each command.")] = 15,
) -> None:
    """Measure, print medians in milliseconds, and write a record."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8)
        LlamaForCausalLM(config).save_pretrained(folder)
        start = [sys.executable, "-m", "regroup.cli"]
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "help": [*start, "--help"],
            "inspect": [*start, "inspect", folder],
        }
        taken: dict[str, list[float]] = {name: [] for name in commands}
        for number in range(runs + 1):
            for name, command in commands.items():
                found = seconds(command)
                if number:
                    taken[name].append(found)
    results: dict[str, Any] = {}
    for name, values in taken.items():
        low, middle, high = min(values), statistics.median(values), max(values)
        results[name] = {"median_seconds": middle, "least_seconds": low, "most_seconds": high}
        typer.echo(f"{name:<8} {middle * 1e3:6.0f} ms ({low * 1e3:.0f} to {high * 1e3:.0f})")
    if output is not None:
        write_record(output, record("startup", {"runs": runs}, results))


if __name__ == "__main__":
    typer.run(main)
