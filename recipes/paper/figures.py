"""The paper's figures, from a record of `python -m recipes.paper`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from .variants import FAMILIES, OURS

LABELS = {
    "average": "average of two tasks, %",
    "nats_per_token": "held-out loss, nats per token (less is better)",
}
NAMES = {"mean": "mean (the paper's)", OURS: "ours"}


def draw(record: dict[str, Any], folder: Path) -> None:
    """Figures 3 to 5, a panel for each family."""
    import matplotlib as mpl

    mpl.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    for name, panel, size in (
        ("figure-3", _trade_off, (5.2, 4.0)),
        ("figure-4", _methods, (4.6, 3.2)),
        ("figure-5", _proportions, (5.2, 4.0)),
    ):
        _panels(record, folder / f"paper-{name}.png", panel, size)


def _panels(
    record: dict[str, Any], path: Path, panel: Callable[[Any, dict[str, Any], str], None], size: tuple[float, float]
) -> None:
    from matplotlib import pyplot as plt

    plot, axes = plt.subplots(1, len(FAMILIES), figsize=(size[0] * len(FAMILIES), size[1]), squeeze=False)
    for axis, family in zip(axes[0], FAMILIES, strict=True):
        answered = panel is _trade_off and family == "encoder-decoder"
        panel(axis, record["results"][family], "average" if answered else "nats_per_token")
        axis.set_title(family)
        axis.grid(alpha=0.3)
    plot.tight_layout()
    plot.savefig(path, dpi=150)
    plt.close(plot)


def shown(found: dict[str, Any], measure: str) -> tuple[float, float]:
    """A measure as it is drawn, with its spread over seeds: per cent for what is a share."""
    factor = 1.0 if measure == "nats_per_token" else 100.0
    return factor * found[measure]["mean"], factor * (found[measure]["standard_deviation"] or 0.0)


def _trade_off(axis: Any, results: dict[str, Any], measure: str) -> None:
    for row in results["table_1"]:
        value, deviation = shown(row, measure)
        milliseconds = 1e3 * row["seconds_per_sample"]["p50"]
        ours = row["model"].endswith("ours")
        axis.errorbar(
            milliseconds, value, yerr=deviation, marker="s" if ours else "o", capsize=3, color="C1" if ours else "C0"
        )
        # To the right of the paper's and to the left of ours, which often stand close together.
        place: dict[str, Any] = {"xytext": (-6, -11), "ha": "right"} if ours else {"xytext": (6, 5)}
        axis.annotate(row["model"], (milliseconds, value), textcoords="offset points", fontsize=8, **place)
    axis.set_xlabel("decoding, milliseconds per sample")
    axis.set_ylabel(LABELS[measure])
    axis.margins(x=0.2)


def _methods(axis: Any, results: dict[str, Any], measure: str) -> None:
    rows = results["figure_4"]
    for place, row in enumerate(rows):
        value, deviation = shown(row, measure)
        axis.barh(place, value, xerr=deviation, color="C1" if row["method"] == OURS else "C0", capsize=3)
        end = (value + deviation, place)
        axis.annotate(f"{value:.2f}", end, textcoords="offset points", xytext=(8, -3), fontsize=8)
    axis.set_yticks(range(len(rows)), [NAMES.get(row["method"], row["method"]) for row in rows])
    axis.invert_yaxis()
    low = min(shown(row, measure)[0] for row in rows)
    high = max(sum(shown(row, measure)) for row in rows)
    # Bars from zero would hide what differs; the axis says where it begins.
    axis.set_xlim(max(0, low - 0.5 * (high - low)), high + 0.25 * (high - low))
    axis.set_xlabel(LABELS[measure])


def _proportions(axis: Any, results: dict[str, Any], measure: str) -> None:
    rows = results["figure_5"]
    for method in dict.fromkeys(row["method"] for row in rows):
        for heads in dict.fromkeys(row["num_key_value_heads"] for row in rows):
            line = [r for r in rows if r["method"] == method and r["num_key_value_heads"] == heads]
            values = [shown(row, measure) for row in line]
            axis.errorbar(
                [row["alpha"] for row in line],
                [value for value, _ in values],
                yerr=[deviation for _, deviation in values],
                marker="s" if method == OURS else "o",
                linestyle="-" if heads == 1 else "--",
                color="C1" if method == OURS else "C0",
                capsize=3,
                label=f"{'MQA' if heads == 1 else f'GQA-{heads}'}, {NAMES[method]}",
            )
    parent = next(row for row in results["table_1"] if row["model"] == "MHA large")
    axis.axhline(shown(parent, measure)[0], color="grey", linestyle=":", label="MHA")
    axis.set_xlabel("uptraining, α")
    axis.set_ylabel(LABELS[measure])
    axis.legend(fontsize=8)
