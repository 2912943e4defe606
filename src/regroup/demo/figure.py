"""The demonstration's figure, from its record alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw(value: dict[str, Any], path: Path) -> None:
    """Excess loss against KV heads, one line per method, and against α (the paper's Figure 5).

    Args:
        value: a record of the kind ``demo``.
        path: a PNG.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _conversions(left, value["results"]["rows"])
    _recoveries(right, value["results"]["uptrained"])
    for axes in (left, right):
        axes.axhline(0, color="0.4", linestyle=":", label="multi-head model")
        axes.set_ylabel("held-out nats per token over the original model")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def _conversions(axes: Any, rows: list[dict[str, Any]]) -> None:
    original = rows[0]
    for method, marker in zip(dict.fromkeys(row["method"] for row in rows[1:]), "osD^vP*", strict=False):
        line = [original] + [row for row in rows if row["method"] == method]
        heads = [row["num_key_value_heads"] for row in line]
        axes.plot(heads, [row["excess_nats_per_token"] for row in line], marker=marker, label=method)
    axes.set_xscale("log", base=2)
    ticks = sorted({row["num_key_value_heads"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("key/value heads (the cache shrinks to the left)")
    axes.set_title("Converted, not yet uptrained", fontsize=11)


def _recoveries(axes: Any, rows: list[dict[str, Any]]) -> None:
    for row, marker in zip(rows, "oP", strict=False):
        base = row["parent_on_the_curve"]
        alphas = [point["alpha"] for point in row["curve"]]
        axes.plot(
            alphas, [point["nats_per_token"] - base for point in row["curve"]], marker=marker, label=row["method"]
        )
    heads = rows[0]["num_key_value_heads"]
    axes.set_xlabel("uptraining, as a share α of the original model's training tokens")
    axes.set_title(f"Uptrained with {heads} key/value heads", fontsize=11)
