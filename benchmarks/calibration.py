"""How long conversion on text takes and how much memory, where the time goes, and whether it grows linearly.

    python benchmarks/calibration.py --output benchmarks/records/calibration.json
    python benchmarks/calibration.py --full --output benchmarks/records/calibration-full.json

The original model is a Llama of 1B parameters (hidden 2048, 32 heads of 64, 16 layers, bfloat16, random weights), the
text random tokens in windows of 2048, the converted model has 8 KV heads; methods and repair are the defaults of
`regroup convert --calibration`. At full size, 16 layers and 128 windows, that takes hours on a few cores. The default
run therefore measures models with fewer layers on fewer windows, each in its own process, and extrapolates to the full
size: the seconds per run of each part, times the number of its runs. Those figures are always named "extrapolated".
``--full`` measures the full size instead. The default takes about ten minutes on two idle cores with AVX-512.

The parts are timed from outside, by wrapping the functions that do them; a part's seconds leave out what parts inside
it took.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from calibrating.ahead import extrapolated, summary
from calibrating.parts import ALGEBRA, FORWARD, REST, TINY, Point, Shape
from calibrating.run import measured
from rich.console import Console
from rich.table import Table

from regroup.record import record, write_record

FULL_LAYERS, FULL_WINDOWS = 16, 128


def show(points: Sequence[dict[str, Any]], ahead: dict[str, Any] | None) -> None:
    """Where the time goes, as a table: a column for each point, seconds and shares of the whole."""
    table = Table(title="Seconds of calibrating and converting", caption="*: extrapolated, not measured")
    table.add_column("part")
    columns = [(f"{p['layers']} × {p['windows']}", p["parts"], p["peak_anonymous_bytes"]) for p in points]
    if ahead is not None:
        columns.append(
            (
                f"{ahead['layers']} × {ahead['windows']} *",
                ahead["extrapolated_parts"],
                ahead["extrapolated_peak_anonymous_bytes"],
            )
        )
    for name, _, _ in columns:
        table.add_column(name, justify="right")

    def cell(value: float, parts: dict[str, float]) -> str:
        return f"{value:.1f} ({value / sum(parts.values()):4.0%})"

    for title, group in (("forward passes", FORWARD), ("linear algebra", ALGEBRA), ("the rest", REST)):
        table.add_section()
        table.add_row(title, *(cell(sum(parts[p] for p in group), parts) for _, parts, _ in columns), style="bold")
        for part in group:
            table.add_row(f"  {part}", *(cell(parts[part], parts) for _, parts, _ in columns))
    table.add_section()
    table.add_row("all", *(f"{sum(parts.values()):.1f}" for _, parts, _ in columns), style="bold")
    table.add_row("peak anonymous GB", *("–" if size is None else f"{size / 1e9:.2f}" for _, _, size in columns))
    # Standard output is the record's where no file is named.
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(table)


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main(
    layers: Annotated[str, typer.Option(help="Layers of the models, for the smallest number of windows.")] = "1,2,3",
    windows: Annotated[str, typer.Option(help="Windows, for the model with the fewest layers.")] = "4,8,16",
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    full: Annotated[bool, typer.Option("--full", help="Measure 16 layers and 128 windows, and nothing else.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A tiny model, to try this program.")] = False,
    device: Annotated[str, typer.Option(help="Where layers run.")] = "cpu",
    scratch: Annotated[Path | None, typer.Option(help="A folder with space for both models.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    """Measure conversion on text."""
    shape = TINY if tiny else Shape()
    whole = Point(FULL_LAYERS, FULL_WINDOWS)
    by_layers, by_windows = numbers(layers), numbers(windows)
    grid = [whole] if full else [Point(by_layers[0], count) for count in by_windows]
    if not full:
        grid += [Point(count, by_windows[0]) for count in by_layers[1:]]
    points: list[dict[str, Any]] = []
    start = time.perf_counter()
    for point in grid:
        points.append(measured(point, shape, repeats, device, scratch))
        print(f"{point.layers} layers, {point.windows} windows: {points[-1]['seconds']:.1f} s", file=sys.stderr)
    ahead = None if full else extrapolated(points, whole, shape)
    results = {
        "points": points,
        "linearity": {} if full else summary(points, by_windows, by_layers),
        "seconds_of_this_program": time.perf_counter() - start,
    }
    if ahead is not None:
        results["extrapolated"] = ahead
    show(points, ahead)
    configuration = {
        **asdict(shape),
        "parameters_at_full_size": shape.parameters(FULL_LAYERS),
        "dtype": "bfloat16",
        "weights": "random",
        "text": "random tokens",
        "batch": 1,
        "method": "auto",
        "grouping": "search",
        "repair": "output",
        "device": device,
        "repeats": repeats,
    }
    write_record(output, record("benchmark/calibration", configuration, results))


if __name__ == "__main__":
    typer.run(main)
