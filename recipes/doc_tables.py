"""The tables of the documentation, from the records beside them: run it after a record was made anew.

    python recipes/doc_tables.py            # rewrites the tables
    python recipes/doc_tables.py --check    # says which ones are not what their records say

A table stands between ``<!-- NAME -->`` and ``<!-- end -->``; NAME is one of ``TABLES``.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from paper import tables as paper
from paper.tables import heading, row
from real import tables as real

from regroup.errors import human_kv_heads

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/records"
# Those that are there: each is made by a command of hours.
REAL = ("real-smollm2.json", "real-mha.json", "real-stories.json", "real-demo.json")


@dataclass(frozen=True)
class DocTable:
    """A table of a page, what it is made of, and how."""

    page: str
    records: tuple[str, ...]
    lines: Callable[..., list[str]]


def uptraining(record: dict[str, Any]) -> list[str]:
    """Excess loss by tokens, a block for each G; beside it the FLOPs, teacher included."""
    rows = record["results"]["table"]
    counts = sorted({entry["tokens"] for entry in rows})
    lines: list[str] = []
    for heads in dict.fromkeys(entry["num_key_value_heads"] for entry in rows):
        own = [entry for entry in rows if entry["num_key_value_heads"] == heads]
        lines += [
            *([""] if lines else []),
            *heading(f"{human_kv_heads(heads)}, tokens", *(f"{count:,}" for count in counts)),
        ]
        for way in dict.fromkeys(entry["way"] for entry in own):
            found = {entry["tokens"]: entry for entry in own if entry["way"] == way}
            lines.append(row(way, *(_excess(found.get(count)) for count in counts)))
            lines.append(row("– FLOPs", *(_flops(found.get(count)) for count in counts)))
    return lines


def _excess(entry: dict[str, Any] | None) -> str:
    if entry is None:
        return "–"
    spread = entry["standard_deviation"]
    value = f"{entry['excess_nats_per_token']:+.3f}"
    return value if spread is None else f"{value} ± {spread:.3f}"


def _flops(entry: dict[str, Any] | None) -> str:
    return "–" if entry is None else "0" if not entry["flops"] else f"{entry['flops']:.2g}"


def throughput(record: dict[str, Any]) -> list[str]:
    lines = heading(
        "", "tokens/s (slowest – fastest)", "time, to plain Trainer's", "to cross-entropy's", "of the matrix rate"
    )
    for way in record["results"]["ways"]:
        # Written by an older release.
        name = way["way"].replace("the parent", "the original model")
        speed = f"{way['tokens_per_second']:,.0f} ({way['slowest']:,.0f} – {way['fastest']:,.0f})"
        share = "–" if way.get("utilisation") is None else f"{way['utilisation']:.0%}"
        ratios = (f"{way[name]:.2f}" for name in ("time_to_plain", "time_to_cross_entropy"))
        lines.append(row(name, speed, *ratios, share))
    return lines


def demo(record: dict[str, Any]) -> list[str]:
    """Excess by merge rule and KV heads, then after uptraining."""
    rows = record["results"]["rows"][1:]
    heads = sorted({entry["num_key_value_heads"] for entry in rows}, reverse=True)
    lines = heading("", *(f"{count} KV heads" if count > 1 else "1" for count in heads))
    names = {"mean": "`mean` (the paper's)", "auto": "`auto`, weights alone"}
    names["auto + text"] = f"`auto` on {record['configuration']['calibration_tokens']:,} tokens of text"
    after = {entry["method"]: entry for entry in record["results"]["uptrained"]}
    for method in dict.fromkeys(entry["method"] for entry in rows):
        found = {entry["num_key_value_heads"]: entry for entry in rows if entry["method"] == method}
        cells = (f"{found[count]['excess_nats_per_token']:+.2f}" for count in heads)
        lines.append(row(names.get(method, f"`{method}`"), *cells))
    for name, entry in after.items():
        cells = (
            f"{entry['excess_nats_per_token']:+.2f}" if count == entry["num_key_value_heads"] else "" for count in heads
        )
        lines.append(row(f"{name}, {entry['uptraining_tokens']:,} tokens", *cells))
    return lines


def advise_speed(record: dict[str, Any]) -> list[str]:
    """Predicted and measured time of a token."""
    lines = heading("batch", "prompt", "KV heads", "predicted, ms", "measured, ms", "ratio")
    for entry in record["results"]["rows"]:
        times = (f"{entry[name]:.1f}" for name in ("predicted_ms", "measured_ms"))
        lines.append(row(entry["batch"], f"{entry['prompt']:,}", entry["kv_heads"], *times, f"{entry['ratio']:.2f}"))
    return lines


def advise_loss(record: dict[str, Any]) -> list[str]:
    """Predicted and real loss of every plan, and whether plans came in the order that was predicted."""
    lines: list[str] = []
    for parent, tau in record["results"]["kendall_tau"].items():
        # The folder of the demonstration's original model.
        model = "demo model" if parent == "parent" else parent
        lines += [*([""] if lines else []), *heading(f"{model}, Kendall's τ {tau:.2f}", "sum over layers", "came to")]
        for plan in record["results"]["plans"]:
            if plan["parent"] == parent:
                name = re.sub(r"G = (\d+)", lambda found: human_kv_heads(int(found[1])), plan["plan"])
                lines.append(row(name, f"{plan['predicted_kl']:.3f}", f"{plan['excess_nats_per_token']:+.3f}"))
    return lines


def scale_sizes(record: dict[str, Any]) -> list[str]:
    """Computed: what is read and written, and the cache."""
    lines = heading("", "parameters", "KV heads", "read, GB", "written, GB", "minutes", "KV cache, KiB per token")
    for entry in record["results"]["rows"]:
        before, after = entry["kv_heads"]
        cache = " → ".join(f"{count / 1024:.0f}" for count in entry["cache_bytes_a_token"])
        sizes = (f"{entry[name] / 1e9:.1f}" for name in ("bytes_read", "bytes_written"))
        minutes = f"{entry['conversion_seconds'] / 60:.1f}"
        lines.append(
            row(entry["model"], f"{entry['parameters'] / 1e9:.1f} B", f"{before} → {after}", *sizes, minutes, cache)
        )
    return lines


def scale_serving(record: dict[str, Any]) -> list[str]:
    """Computed: a device's memory, the largest batch and the least time of a step."""
    lines = heading(
        "", "devices", "weights, GB per device", "cache, GB per device", "largest batch", "minimum ms per step"
    )
    for entry in record["results"]["rows"]:
        pairs = zip(*(part.values() for part in entry["serving"]), strict=True)
        weights, cache, fits, batch, seconds = pairs
        marks = ["" if fit else "*" for fit in fits]
        lines.append(
            row(
                entry["model"],
                entry["devices"],
                " → ".join(f"{count / 1e9:.1f}" for count in weights),
                " → ".join(f"{count / 1e9:.1f}{mark}" for count, mark in zip(cache, marks, strict=True)),
                " → ".join(map(str, batch)),
                " → ".join(f"{1e3 * second:.1f}" for second in seconds),
            )
        )
    return lines


def scale_training(record: dict[str, Any]) -> list[str]:
    """Computed: FLOPs and hours of devices."""
    lines = heading("", "α tokens", "FLOPs", "device hours", "distilled tokens", "FLOPs", "device hours")
    for entry in record["results"]["rows"]:
        cells: list[str] = []
        for run in (entry["uptraining"], entry["distillation"]):
            count = "–" if run is None else f"{run['tokens'] / 1e9:.0f} B"
            cells += [count, *(["–"] * 2 if run is None else [f"{run['flops']:.1e}", f"{run['device_hours']:,.0f}"])]
        lines.append(row(entry["model"], *cells))
    return lines


def scale_measured(record: dict[str, Any]) -> list[str]:
    """Measured: conversion beside cp, memory, and what is left to do after a kill."""
    size = record["results"]["source_bytes"] / 1e9
    lines = heading(
        f"{size:.1f} GB",
        "`cp -r` and flush, s",
        "convert, s",
        "estimated, s",
        "anonymous memory, MB",
        "killed after, s",
        "of files",
        "resumed, s",
    )
    for method, found in record["results"]["methods"].items():
        kill = found["killed_and_resumed"]
        least, most = found["forecast"]["seconds"]
        lines.append(
            row(
                f"`{method}`",
                f"{median(found['cp_r_and_flush_seconds']):.1f}",
                f"{median(found['convert_seconds']):.1f}",
                f"{least:.1f} – {most:.1f}",
                f"{found['peak_anonymous_bytes'] / 1e6:.0f}",
                f"{kill['seconds_until_killed']:.1f}",
                f"{kill['finished_when_killed']} of {kill['weight_files']}",
                f"{kill['seconds_to_go_on']:.1f}",
            )
        )
    return lines


TABLES = {
    "uptraining stories": DocTable("docs/uptraining.md", ("uptraining-stories260k.json",), uptraining),
    "uptraining demo": DocTable("docs/uptraining.md", ("uptraining-demo.json",), uptraining),
    "throughput": DocTable("docs/uptraining.md", ("uptraining-throughput.json",), throughput),
    "advise loss": DocTable("docs/choosing-g.md", ("advise-loss.json",), advise_loss),
    "advise speed": DocTable("docs/choosing-g.md", ("advise-speed.json",), advise_speed),
    "paper parents": DocTable("docs/results.md", ("paper.json",), paper.pretraining),
    "paper table 1": DocTable("docs/results.md", ("paper.json",), paper.table_1),
    "paper fine-tuning": DocTable("docs/results.md", ("paper.json",), paper.fine_tuning),
    "paper figure 4": DocTable("docs/results.md", ("paper.json",), paper.figure_4),
    "paper figure 5": DocTable("docs/results.md", ("paper.json",), paper.figure_5),
    "paper figure 6": DocTable("docs/results.md", ("decode-t5-xxl.json",), paper.figure_6),
    "paper appendix": DocTable("docs/results.md", ("paper.json",), paper.appendix),
    "real models": DocTable(
        "docs/real-models.md", tuple(name for name in REAL if (RECORDS / name).exists()), real.sections
    ),
    "smollm2": DocTable("README.md", ("real-smollm2.json",), real.summary),
    "paper": DocTable("README.md", ("paper.json",), paper.summary),
    "demo": DocTable("README.md", ("demo.json",), demo),
    "scale sizes": DocTable("docs/scale.md", ("scale-computed.json",), scale_sizes),
    "scale serving": DocTable("docs/scale.md", ("scale-computed.json",), scale_serving),
    "scale training": DocTable("docs/scale.md", ("scale-computed.json",), scale_training),
    "scale measured": DocTable("docs/scale.md", ("scale.json",), scale_measured),
}


def made(table: DocTable) -> str:
    records = [json.loads((RECORDS / name).read_text(encoding="utf-8")) for name in table.records]
    return "\n".join(table.lines(*records))


def span(text: str, name: str) -> tuple[int, int]:
    """Where the table of a name stands in a page."""
    found = re.search(rf"<!-- {re.escape(name)} -->\n(.*?)\n<!-- end -->", text, re.S)
    if found is None:
        raise SystemExit(f"no place for the table {name!r}: <!-- {name} --> and <!-- end -->")
    return found.span(1)


def stale(root: Path = ROOT) -> list[str]:
    """Names of the tables that are not what their records say."""
    wrong = []
    for name, table in TABLES.items():
        text = (root / table.page).read_text(encoding="utf-8")
        first, last = span(text, name)
        if text[first:last] != made(table):
            wrong.append(name)
    return wrong


def main(check: Annotated[bool, typer.Option("--check")] = False) -> None:
    wrong = stale()
    if check:
        print("\n".join(wrong) or "all tables are what their records say")
        sys.exit(bool(wrong))
    for name in wrong:
        page = ROOT / TABLES[name].page
        text = page.read_text(encoding="utf-8")
        first, last = span(text, name)
        page.write_text(text[:first] + made(TABLES[name]) + text[last:], encoding="utf-8")
        print(f"wrote {name} in {TABLES[name].page}")


if __name__ == "__main__":
    typer.run(main)
