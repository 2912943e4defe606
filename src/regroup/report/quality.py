"""What conversions cost: losses and answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from ..errors import human_kv_heads
from .figures import Figure, Section, Table, bars, number
from .records import Record, labels

_INTERVAL = alt.Tooltip("interval:N", title="95% interval")
_EXCESS = "loss over the original model, nats per token"


def section(records: Sequence[Record]) -> Section | None:
    """Quality, from evaluations, the demonstration and tables of methods."""
    made: list[Figure] = []
    losses: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.kind == "evaluate/language-modeling":
            text = tuple(record.configuration.get(key) for key in ("data", "window", "windows", "document_starts"))
            losses.setdefault(text, []).append(record)
    made += [_losses(same) for same in losses.values()]
    for record in records:
        if record.kind in ("demo", "conversion-methods", "conversion-g2p"):
            made.append(_methods(record))
    for digest in dict.fromkeys(r.configuration.get("digest") for r in records if r.kind == "evaluate/task"):
        made += _tasks([r for r in records if r.kind == "evaluate/task" and r.configuration.get("digest") == digest])
    if not made:
        return None
    return Section("quality", "Quality", "What was lost by sharing heads. Whiskers are 95% intervals over rows.", made)


def _losses(records: Sequence[Record]) -> Figure:
    """Models on one text; an original model that several were compared with appears once."""
    found: list[tuple[str, str, float, float | None]] = []
    for record in records:
        loss, error = record.results["nats_per_token"], record.results.get("standard_error")
        found.append((str(record.configuration["model"]), record.file, loss, error))
        teacher = record.configuration.get("teacher")
        if teacher and record.results.get("teacher_nats_per_token") is not None:
            loss, error = record.results["teacher_nats_per_token"], record.results.get("teacher_standard_error")
            found.append((str(teacher), record.file, loss, error))
    once = {(model, loss): (model, file, loss, error) for model, file, loss, error in found}
    found = sorted(once.values(), key=lambda one: one[2])
    names = labels([(model, file) for model, file, _, _ in found])
    rows, cells = [], []
    for name, (_, _, loss, error) in zip(names, found, strict=True):
        low, high = loss - 1.96 * (error or 0.0), loss + 1.96 * (error or 0.0)
        between = "–" if error is None else f"{low:.4f} – {high:.4f}"
        rows.append({"model": name, "loss": loss, "low": low, "high": high, "interval": between})
        cells.append((name, number(loss, 4), between))
    tip = [alt.Tooltip("model:N"), alt.Tooltip("loss:Q", format=".4f", title="nats per token"), _INTERVAL]
    table = Table(("model", "nats per token", "95% interval"), cells)
    drawn = bars(rows, name="model", value="loss", title="nats per token", tooltip=tip, low="low", high="high")
    data = records[0].configuration.get("data")
    return Figure(f"Loss on held-out text: {data}", _from(records), drawn, table)


def _methods(record: Record) -> Figure:
    """Excess by way of converting, a bar for each number of KV heads."""
    pairs = record.kind == "conversion-g2p"
    key = "excess" if pairs else "excess_nats_per_token"
    title = "phoneme error rate over the original model's" if pairs else _EXCESS
    found = [row for row in record.results["rows"] if row.get("method") not in ("parent", None)]
    found += [
        {**row, "method": f"{row['method']}, {row['uptraining_tokens']:,} tokens"}
        for row in record.results.get("uptrained", [])
    ]
    rows = [
        {
            "name": f"{row['method']}, {human_kv_heads(row['num_key_value_heads'])}",
            "KV heads": human_kv_heads(row["num_key_value_heads"]),
            "excess": row[key],
            "low": row["excess_95"][0] if "excess_95" in row else row[key],
            "high": row["excess_95"][1] if "excess_95" in row else row[key],
            "interval": "{:+.3f} – {:+.3f}".format(*row["excess_95"]) if "excess_95" in row else "–",
        }
        for row in found
        if row.get(key) is not None
    ]
    tip = [alt.Tooltip("name:N", title="way"), alt.Tooltip("excess:Q", format="+.4f", title=title), _INTERVAL]
    drawn = bars(rows, name="name", value="excess", title=title, tooltip=tip, color="KV heads", low="low", high="high")
    cells = [(row["name"], number(row["excess"], 3, sign=True), row["interval"]) for row in rows]
    table = Table(("way", title, "95% interval"), cells)
    parent = record.configuration.get("parent", "the demonstration's model")
    return Figure(f"Ways to convert {parent}, before and after uptraining", record.conditions, drawn, table)


def _tasks(records: Sequence[Record]) -> list[Figure]:
    """A figure for each metric: models side by side."""
    made = []
    names = dict.fromkeys(name for record in records for name in record.results["metrics"])
    for name in names:
        rows, cells = [], []
        asked = [record for record in records if record.results["metrics"].get(name) is not None]
        models = labels([(str(record.configuration["model"]), record.file) for record in asked])
        for model, record in zip(models, asked, strict=True):
            found = record.results["metrics"][name]
            value, low, high = (found[key] for key in ("value", "low", "high"))
            between = "–" if low is None else f"{low:.3f} – {high:.3f}"
            low, high = (value, value) if low is None else (low, high)
            rows.append({"model": model, "value": value, "low": low, "high": high, "interval": between})
            difference = found.get("difference")
            against = "–"
            if difference is not None:
                against = f"{difference['value']:+.3f} to {record.configuration['against']} (p = {difference['p']:.3f})"
            cells.append((model, number(value), between, against))
        word = name.replace("_", " ")
        tip = [alt.Tooltip("model:N"), alt.Tooltip("value:Q", format=".4f", title=word), _INTERVAL]
        drawn = bars(rows, name="model", value="value", title=word, tooltip=tip, low="low", high="high")
        table = Table(("model", word, "95% interval", "against the other"), cells)
        less = any(r.results["metrics"].get(name, {}).get("lower_is_better") for r in records)
        title = f"{records[0].configuration['task']}: {word}" + (" (less is better)" if less else "")
        made.append(Figure(title, _from(records), drawn, table))
    return made


def _from(records: Sequence[Record]) -> str:
    return "; ".join(dict.fromkeys(record.conditions for record in records))
