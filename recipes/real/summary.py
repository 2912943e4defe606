"""Results of single steps, put together for the record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from .paired import difference, excess, mean_and_error, mean_of, over_seeds
from .targets import Target
from .ways import CONVERSIONS, MEAN, PAPER, TRAININGS

Result = dict[str, Any]


def summarise(target: Target, original: Result, results: Sequence[Result]) -> dict[str, Any]:
    """What the record says.

    Args:
        target: of the results.
        original: the original model's.
        results: of conversions and uptraining runs that are there, in any order.

    Returns:
        ``original`` by held-out text; ``rows``, in the order of the tables, each over its seeds, compared with `mean`
        (conversions) or the paper's recipe at the same tokens; ``samples`` of the first seed.
    """
    by_row: dict[tuple[str, str, int], list[Result]] = {}
    for result in results:
        by_row.setdefault((result["shape"], result["way"], result["tokens"]), []).append(result)
    texts = original["measured"]["texts"]
    rows, samples = [], [{"row": None, "texts": original["measured"]["samples"]}]
    for key in order(target):
        if key not in by_row:
            continue
        found = sorted(by_row[key], key=lambda result: result["seed"])
        shape, way, tokens = key
        against = by_row.get((shape, PAPER.name if tokens else MEAN.name, tokens))
        rows.append(
            {
                "shape": shape,
                "way": way,
                "tokens": tokens,
                "seeds": len(found),
                "rate": found[0].get("rate"),
                "texts": {name: _on(name, found, against) for name in texts},
                "took": took(found),
            }
        )
        samples.append({"row": list(key), "texts": found[0]["measured"]["samples"]})
    return {
        "original": {name: _loss(windows) for name, windows in texts.items()},
        "rows": rows,
        "prompts": list(target.prompts),
        "samples": samples,
    }


def order(target: Target) -> list[tuple[str, str, int]]:
    """Shape, way and tokens of all rows."""
    return [
        (shape.name, name, tokens)
        for shape in target.shapes
        for tokens in (0, *target.tokens)
        for name in ([way.name for way in CONVERSIONS] if tokens == 0 else [way.name for way in TRAININGS])
    ]


def _loss(windows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    value, error = mean_and_error([window["nats"] for window in windows], [window["tokens"] for window in windows])
    return {"nats_per_token": value, "standard_error": error}


def _on(name: str, found: Sequence[Result], against: Sequence[Result] | None) -> dict[str, Any]:
    """A row on one text."""
    runs = [result["measured"]["texts"][name] for result in found]
    tokens = [window["tokens"] for window in runs[0]]
    value, error = mean_and_error(over_seeds(runs), tokens)
    seeds = [mean_and_error(excess(run), tokens)[0] for run in runs]
    row: dict[str, Any] = {
        "excess_nats_per_token": value,
        "excess_standard_error": error,
        "excess_by_seed": seeds,
        "standard_deviation_over_seeds": stdev(seeds) if len(seeds) > 1 else None,
        "kl_nats_per_token": mean(mean_of(run, "kl") for run in runs),
        "top1_agreement": mean(mean_of(run, "top1") for run in runs),
    }
    if against is not None and against[0]["way"] != found[0]["way"]:
        others = [result["measured"]["texts"][name] for result in against]
        less, error = difference(runs, others)
        theirs = mean_and_error(over_seeds(others), tokens)[0]
        row["against"] = {
            "way": against[0]["way"],
            "difference": less,
            "standard_error": error,
            "share_of_its_excess": value / theirs if theirs > 0 else None,
        }
    return row


def took(found: Sequence[Result]) -> dict[str, Any]:
    """By command: the mean time of seeds that were not interrupted, and the most memory of all."""
    commands = dict.fromkeys(name for result in found for name in result["took"])
    summed = {}
    for name in commands:
        runs = [result["took"][name] for result in found if name in result["took"]]
        whole = [run for run in runs if not run["resumed"]]
        summed[name] = {
            "seconds": mean(run["seconds"] for run in whole) if whole else None,
            "cpu_seconds": mean(run["cpu_seconds"] for run in whole) if whole else None,
            "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        }
    return summed
