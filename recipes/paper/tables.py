"""The tables of docs/results.md in Markdown, from a record of `python -m recipes.paper`."""

from __future__ import annotations

from typing import Any

from .paired import compare

MEASURES = {
    "encoder-decoder": ("average", "pronunciation", "restoration", "nats_per_token"),
    "decoder": ("nats_per_token", "continuation"),
}
# Without fine-tuning.
LOSSES = {"encoder-decoder": ("nats_per_token",), "decoder": ("nats_per_token", "continuation")}
TITLES = {
    "average": "average, %",
    "pronunciation": "pronunciation, %",
    "restoration": "restoration, %",
    "nats_per_token": "nats per token",
    "continuation": "continuation, %",
}


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def heading(*cells: object) -> list[str]:
    return [row(*cells), row(*("---" for _ in cells))]


def table_1(record: dict[str, Any]) -> list[str]:
    """Both families' Table 1, one after the other: time, then each measure with its spread over seeds."""
    lines: list[str] = []
    for family, names in MEASURES.items():
        titles = [TITLES[name] for name in names]
        lines += [*([""] if lines else []), *heading(family, "ms per sample", "cache, MB", *titles)]
        for entry in record["results"][family]["table_1"]:
            time = f"{1e3 * entry['seconds_per_sample']['p50']:.2f}"
            lines.append(
                row(
                    entry["model"],
                    time,
                    f"{entry['cache_bytes'] / 1e6:.1f}",
                    *(_measure(entry, name) for name in names),
                )
            )
    return lines


def summary(record: dict[str, Any]) -> list[str]:
    """Table 1 in the measures that matter most."""
    lines = heading(
        "",
        "encoder-decoder: nats per token",
        "two tasks, %",
        "ms per sample",
        "decoder: nats per token",
        "ms per sample",
    )
    for pair in zip(*(record["results"][family]["table_1"] for family in MEASURES), strict=True):
        cells: list[str] = []
        for entry, names in zip(pair, (("nats_per_token", "average"), ("nats_per_token",)), strict=True):
            cells += [_measure(entry, name) for name in names]
            cells.append(f"{1e3 * entry['seconds_per_sample']['p50']:.1f}")
        lines.append(row(pair[0]["model"], *cells))
    return lines


def figure_4(record: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for family, names in LOSSES.items():
        titles = [TITLES[name] for name in names]
        lines += [*([""] if lines else []), *heading(f"{family}, MQA, α = 0.05", *titles)]
        for entry in record["results"][family]["figure_4"]:
            lines.append(row(entry["method"], *(_measure(entry, name) for name in names)))
    return lines


def figure_5(record: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for family, names in LOSSES.items():
        found = record["results"][family]["figure_5"]
        alphas = list(dict.fromkeys(entry["alpha"] for entry in found))
        title = f"{family}, {TITLES[names[0]]}, by α"
        lines += [*([""] if lines else []), *heading(title, *(f"{alpha:g}" for alpha in alphas))]
        for method, heads in dict.fromkeys((entry["method"], entry["num_key_value_heads"]) for entry in found):
            cells = [e for e in found if (e["method"], e["num_key_value_heads"]) == (method, heads)]
            name = "MQA" if heads == 1 else f"GQA-{heads}"
            lines.append(row(f"{name}, {method}", *(_measure(entry, names[0]) for entry in cells)))
    return lines


def appendix(record: dict[str, Any]) -> list[str]:
    """Spread over seeds and spikes of the loss."""
    lines: list[str] = []
    for family, names in MEASURES.items():
        spikes = family == "encoder-decoder"
        more = ("spikes in fine-tuning", "runs that diverged") if spikes else ()
        lines += [*([""] if lines else []), *heading(family, *(f"spread of {TITLES[n]}" for n in names), *more)]
        for entry in record["results"][family]["appendix_a"]:
            cells = [_spread(entry, name) for name in names]
            cells += [f"{sum(entry[name]['seeds']):.0f}" for name in ("spikes", "diverged")] if spikes else []
            lines.append(row(entry["model"], *cells))
    return lines


# Which model is compared with which, in the table of fine-tuned answers.
COMPARED = (
    ("GQA large", "MHA large"),
    ("GQA large, ours", "MHA large"),
    ("MQA large", "MHA large"),
    ("MQA large, ours", "MHA large"),
    ("GQA large, ours", "GQA large"),
    ("MQA large, ours", "MQA large"),
    ("MHA large, continued", "MHA large"),
    ("GQA large", "MHA large, continued"),
    ("GQA large, ours", "MHA large, continued"),
    ("MHA large", "MHA large, untrained"),
)


def fine_tuning(record: dict[str, Any]) -> list[str]:
    """Answers of fine-tuned encoder-decoders, then differences over the same seeds with their paired t-test."""
    found = record["results"]["encoder-decoder"]
    # Records from before there was such a comparison have the models of Table 1 and appendix A.
    rows = found.get("fine_tuning") or [*found["table_1"], found["appendix_a"][0]]
    answers = {entry["model"]: entry["average"]["seeds"] for entry in rows}
    names = ("average", "pronunciation", "restoration")
    seeds = len(rows[0]["average"]["seeds"])
    lines = heading(f"fine-tuned, {seeds} seeds", *(TITLES[name] for name in names))
    lines += [row(entry["model"], *(_measure(entry, name) for name in names)) for entry in rows]
    lines += ["", *heading("difference of averages, points", "paired, ± standard error", "p")]
    for one, other in COMPARED:
        if one in answers and other in answers:
            apart = compare(answers[one], answers[other])
            value = f"{100 * apart.mean:+.1f}"
            if apart.standard_error is not None and apart.p is not None:
                lines.append(row(f"{one} − {other}", f"{value} ± {100 * apart.standard_error:.1f}", f"{apart.p:.2f}"))
    return lines


def pretraining(record: dict[str, Any]) -> list[str]:
    """The original models, and whether their loss spiked."""
    lines = heading("original model", "tokens", "steps", "FLOPs", "last training loss, nats per token", "spikes")
    names = {"large": "large", "small": "small", "scratch": "large, one KV head from scratch"}
    for family in MEASURES:
        for which, entry in record["results"][family]["pretraining"].items():
            counts = (f"{entry['tokens']:,}", f"{entry['steps']:,}", f"{entry['flops']:.1e}")
            loss = f"{entry['last_cross_entropy']:.3f}"
            lines.append(row(f"{family}, {names[which]}", *counts, loss, entry["spikes"]))
    return lines


def figure_6(record: dict[str, Any]) -> list[str]:
    """Time by groups, at the width of T5-XXL."""
    lines = heading("KV heads", "first token, s", "each further token, ms", "KV cache, MB")
    for entry in record["results"]["models"]:
        found = entry["regroup"]
        lines.append(
            row(
                entry["kv_heads"],
                f"{found['first_token_ms'] / 1e3:.1f}",
                f"{found['token_ms']['p50']:.0f} ({found['token_ms']['p20']:.0f} – {found['token_ms']['p80']:.0f})",
                f"{found['cache_bytes'] / 1e6:.0f}",
            )
        )
    return lines


def _measure(entry: dict[str, Any], name: str) -> str:
    places, factor = (3, 1) if name == "nats_per_token" else (1, 100)
    spread = entry[name]["standard_deviation"]
    value = f"{factor * entry[name]['mean']:.{places}f}"
    return value if not spread else f"{value} ± {factor * spread:.{places}f}"


def _spread(entry: dict[str, Any], name: str) -> str:
    places, factor = (3, 1) if name == "nats_per_token" else (1, 100)
    values = [factor * value for value in entry[name]["seeds"]]
    return f"{min(values):.{places}f} – {max(values):.{places}f}"
