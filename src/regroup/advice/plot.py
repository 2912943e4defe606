"""Plot of time against loss of every candidate, with the Pareto front."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..extras import require
from ..plots import save


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Draw a record of ``regroup advise``; the file is written atomically.

    Raises:
        RegroupError: there is no loss to draw, or the file cannot be written.
    """
    require("report", "matplotlib")
    from matplotlib.figure import Figure

    rows = record["results"]["candidates"]
    key = next((k for k in ("loss_after", "loss", "energy") if rows[0][k] is not None), None)
    if key is None:
        raise RegroupError(
            "there is no loss to draw", got="a config alone", remedy="pass a checkpoint, and text with --calibration"
        )
    labels = {
        "loss_after": "loss above the original model after uptraining, nats per token",
        "loss": "loss above the original model, nats per token",
        "energy": "lost energy of the heads (not a loss)",
    }
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    for by_layer, color, label in ((False, "C0", "the same in every layer"), (True, "C1", "by layer")):
        part = [row for row in rows if (row["kv_heads"] is None) == by_layer]
        if not part:
            continue
        values = [row[key] for row in part]
        errors = None
        if key != "energy":
            low = [row[key] - row[f"{key}_low"] for row in part]
            errors = (low, [row[f"{key}_high"] - row[key] for row in part])
        times = [1e3 * row["token_seconds"] for row in part]
        axes.errorbar(times, values, yerr=errors, fmt="o", color=color, capsize=3, label=label)
        for row, time in zip(part, times, strict=True):
            name = row["name"].removeprefix("by layer, as ")
            axes.annotate(
                name, (time, row[key]), textcoords="offset points", xytext=(6, -11 if by_layer else 5), fontsize=8
            )
    front = sorted((1e3 * row["token_seconds"], row[key]) for row in rows if row["pareto"])
    axes.plot(*zip(*front, strict=True), color="0.6", linestyle="--", zorder=0, label="nothing is faster and better")
    asked = record["configuration"]
    axes.set_xlabel(
        f"milliseconds per token, batch {asked['batch']}, context {asked['context']:,}, {asked['hardware']}"
    )
    axes.set_ylabel(labels[key])
    axes.set_ylim(bottom=0)
    axes.margins(x=0.18)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise RegroupError("the plot cannot be written", file=path, got=error.strerror or str(error)) from error
