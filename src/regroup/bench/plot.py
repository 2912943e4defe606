"""Plot of time per token against the number of KV heads, like Figure 6 of the paper."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..extras import require
from ..plots import save

_LABELS = {"regroup": "regroup", "transformers": "transformers' default"}


def draw_groups(record: Mapping[str, Any], path: Path) -> None:
    """Draw milliseconds per token against KV heads, with the floor, from a record of ``bench decode``.

    Bars show the 20 and 80% quantiles. The file is written atomically.

    Raises:
        RegroupError: fewer than two numbers of KV heads, or the file cannot be written.
    """
    require("report", "matplotlib")
    from matplotlib.figure import Figure

    models = sorted(
        (model for model in record["results"]["models"] if model["kv_heads"] is not None),
        key=lambda model: model["kv_heads"],
    )
    if len(models) < 2:
        raise RegroupError("a plot against KV heads needs at least two numbers of KV heads", got=len(models))
    figure = Figure(figsize=(5.6, 3.8), layout="constrained")
    axes = figure.subplots()
    heads = [model["kv_heads"] for model in models]
    for path_name, label in _LABELS.items():
        if any(path_name not in model for model in models):
            continue
        times = [model[path_name]["token_ms"] for model in models]
        middle = [time["p50"] for time in times]
        spread = (
            [time["p50"] - time["p20"] for time in times],
            [time["p80"] - time["p50"] for time in times],
        )
        axes.errorbar(heads, middle, yerr=spread, marker="o", capsize=3, label=label)
    axes.plot(heads, [model["floor_ms"] for model in models], "--", color="0.4", label="floor of this machine")
    axes.set_xscale("log", base=2)
    axes.set_xticks(heads, [str(count) for count in heads])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("KV heads (groups)")
    axes.set_ylabel("milliseconds per token")
    done = record["configuration"]
    part = models[0]
    cut = "" if part["layers"] == part["layers_of_the_model"] else f", {part['layers']} layers"
    axes.set_title(
        f"{done['model']}{cut}: batch {done['batch']}, prompt {done['prompt']}, {done['dtype']}", fontsize=10
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(figure, path)
    except OSError as error:
        raise RegroupError("the plot cannot be written", file=path, got=error.strerror or str(error)) from error
