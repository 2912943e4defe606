"""From measurements to sizes that were not measured, and how straight the way there is."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

from .parts import ALGEBRA, FORWARD, REST, Point, Shape, shares


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the least-squares line."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept, statistics.correlation(x, y) ** 2


def linearity(points: Sequence[dict[str, Any]], along: str, what: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """How straight a figure grows along an axis: R² of a line, and what a step costs at the end beside the start.

    A ratio of marginal costs of 1 is a straight line, below 1 the cost of a further unit falls.
    """
    x, y = [float(point[along]) for point in points], [what(point) for point in points]
    slope, intercept, fit = line(x, y)
    steps = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    return {
        along: [point[along] for point in points],
        "values": y,
        "slope": slope,
        "intercept": intercept,
        "r_squared": fit,
        "marginal_costs": steps,
        "ratio_of_marginal_costs": steps[-1] / steps[0],
    }


def passes_of(windows: int, window: int) -> dict[str, int]:
    """How many windows each kind of pass takes, as the converter itself divides them: fitted, judged on, held out."""
    import torch

    from regroup.calibration.layer_converter import LayerConverter
    from regroup.calibration.settings import Settings

    stream = SimpleNamespace(batches=[None] * windows, hidden=[torch.empty(1, window, 0)])
    worker = LayerConverter(cast(Any, None), cast(Any, stream), Settings())
    return {"all": windows, "fit": len(worker.fit), "judging": len(worker.judging), "held_out": len(worker.held_out)}


def expected_calls(point: Point, window: int, candidates: float) -> dict[str, float]:
    """How often the parts run that run once a window, for so many candidates a layer."""
    found = passes_of(point.windows, window)
    tries = candidates * (found["judging"] + found["held_out"])
    once = {
        "parent forward": found["all"],
        "search forward": found["judging"],
        "search moments": found["judging"],
        "moments": found["fit"],
        "candidate forward": tries,
        "candidate sums": tries,
        "refit forward": found["all"],
        "refit sums": found["all"],
        "child forward": found["all"],
    }
    return {part: point.layers * count for part, count in once.items()}


def extrapolated(points: Sequence[dict[str, Any]], full: Point, shape: Shape) -> dict[str, Any]:
    """The full size from the points: seconds for each time a part ran, times how often it would run.

    What runs once a window is taken from the point with the most windows, what runs once a layer or whose calls do not
    depend on the windows from all layers of all points.
    """
    largest = max(points, key=lambda point: (point["windows"], point["layers"]))
    layers = sum(point["layers"] for point in points)
    candidates = sum(point["calls"].get("candidate solve", 0) for point in points) / layers
    calls = expected_calls(full, shape.window, candidates)
    parts: dict[str, float] = {}
    for part in FORWARD + ALGEBRA + REST:
        if part in calls:
            parts[part] = largest["parts"][part] / max(1, largest["calls"].get(part, 0)) * calls[part]
        else:
            parts[part] = sum(point["parts"][part] for point in points) / layers * full.layers
    # Done once, whatever the layers: a plane through the first point, which has the fewest layers and windows.
    least = points[0]
    parts["load"] = least["parts"]["load"]
    for along in ("layers", "windows"):
        other = "windows" if along == "layers" else "layers"
        same = [point for point in points if point[other] == least[other]]
        if len(same) > 1:
            slope, _ = line([point[along] for point in same], [point["parts"]["load"] for point in same])[:2]
            parts["load"] += max(0.0, slope) * (getattr(full, along) - least[along])
    held_out = passes_of(largest["windows"], shape.window)["held_out"]
    parts["held-out KL"] = (
        largest["parts"]["held-out KL"] / held_out * passes_of(full.windows, shape.window)["held_out"]
    )
    peaks: dict[str, float] = {}
    one = [point for point in points if point["layers"] == largest["layers"]]
    for part in largest["peak_anonymous_bytes_by_part"]:
        # Too short to be sampled at every size.
        if len(one) > 1 and all(part in point["peak_anonymous_bytes_by_part"] for point in one):
            sizes = [point["peak_anonymous_bytes_by_part"][part] for point in one]
            slope, intercept, _ = line([point["windows"] for point in one], sizes)
            peaks[part] = intercept + slope * full.windows
    highest = max(peaks, key=lambda part: peaks[part]) if peaks else None
    return {
        **asdict(full),
        "candidates_a_layer": candidates,
        "extrapolated_seconds": sum(parts.values()),
        "extrapolated_parts": parts,
        **{f"extrapolated_{name}": value for name, value in shares(parts).items()},
        "extrapolated_peak_anonymous_bytes": peaks[highest] if highest else None,
        "extrapolated_peak_is_in": highest,
    }


def summary(points: Sequence[dict[str, Any]], by_windows: list[int], by_layers: list[int]) -> dict[str, Any]:
    """Linearity along both axes."""

    def at(layers: Sequence[int], windows: Sequence[int]) -> list[dict[str, Any]]:
        found = [point for point in points if point["layers"] in layers and point["windows"] in windows]
        return sorted(found, key=lambda point: (point["layers"], point["windows"]))

    def seconds(point: dict[str, Any]) -> float:
        # Loading the parent and the first layer's inputs are no part of what layers cost.
        return point["seconds"] - point["parts"]["load"]

    def once_a_window(point: dict[str, Any]) -> float:
        return (
            sum(point["parts"][part] for part in ("parent forward", "moments", "refit forward", "refit sums"))
            + (point["parts"]["child forward"])
        )

    found: dict[str, Any] = {}
    if len(by_layers) > 2:
        along = at(by_layers, by_windows[:1])
        found["seconds_by_layers"] = linearity(along, "layers", seconds)
    if len(by_windows) > 2:
        along = at(by_layers[:1], by_windows)
        found["seconds_by_windows"] = linearity(along, "windows", seconds)
        # Candidates are fitted on a limited number of tokens, so all seconds together grow by less than a line.
        found["seconds_of_passes_over_all_windows"] = linearity(along, "windows", once_a_window)
        found["peak_anonymous_bytes_by_windows"] = linearity(along, "windows", lambda p: p["peak_anonymous_bytes"])
    return found
