"""What conversions cost: losses and answers before and after."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from .figures import Figure, Section, Table, bars, number
from .records import Record

_EXCESS = "loss over the parent, nats a token"


def section(records: Sequence[Record]) -> Section | None:
    """Quality, from evaluations, the demonstration and tables of methods."""
    made: list[Figure] = []
    losses = [record for record in records if record.kind == "evaluate/language-modeling"]
    if losses:
        made.append(_losses(losses))
    for record in records:
        if record.kind in ("demo", "conversion-methods", "conversion-g2p"):
            made.append(_methods(record))
    for digest in dict.fromkeys(r.configuration.get("digest") for r in records if r.kind == "evaluate/task"):
        made += _tasks([r for r in records if r.kind == "evaluate/task" and r.configuration.get("digest") == digest])
    if not made:
        return None
    return Section("quality", "Quality", "What was lost by sharing heads. Whiskers are 95% intervals over rows.", made)


def _losses(records: Sequence[Record]) -> Figure:
    rows = []
    for record in records:
        found, model = record.results, record.configuration["model"]
        bound = 1.96 * (found.get("standard_error") or 0.0)
        rows.append(_loss_row(model, found["nats_per_token"], bound))
        teacher = record.configuration.get("teacher")
        if teacher and found.get("teacher_nats_per_token") is not None:
            rows.append(_loss_row(teacher, found["teacher_nats_per_token"], bound))
    rows = list({row["model"]: row for row in sorted(rows, key=lambda row: row["loss"])}.values())
    tip = [alt.Tooltip("model:N"), alt.Tooltip("loss:Q", format=".4f", title="nats a token")]
    table = Table(
        ("model", "nats a token", "95% interval"),
        [(row["model"], number(row["loss"], 4), f"{row['low']:.4f} – {row['high']:.4f}") for row in rows],
    )
    drawn = bars(rows, name="model", value="loss", title="nats a token", tooltip=tip, low="low", high="high")
    data = ", ".join(dict.fromkeys(str(record.configuration.get("data")) for record in records))
    return Figure("Loss on held-out text", f"{data}; {_from(records)}", drawn, table)


def _loss_row(model: str, loss: float, bound: float) -> dict[str, Any]:
    name = str(model).rstrip("/").rpartition("/")[2] or str(model)
    return {"model": name, "loss": loss, "low": loss - bound, "high": loss + bound}


def _methods(record: Record) -> Figure:
    """Excess by way of converting, a bar for each number of KV heads."""
    pairs = record.kind == "conversion-g2p"
    key = "excess" if pairs else "excess_nats_per_token"
    title = "phoneme error rate over the parent's" if pairs else _EXCESS
    found = [row for row in record.results["rows"] if row.get("method") not in ("parent", None)]
    found += [
        {**row, "method": f"{row['method']}, {row['uptraining_tokens']:,} tokens"}
        for row in record.results.get("uptrained", [])
    ]
    rows = [
        {
            "name": f"{row['method']}, G = {row['num_key_value_heads']}",
            "G": f"G = {row['num_key_value_heads']}",
            "excess": row[key],
            "low": row["excess_95"][0] if "excess_95" in row else row[key],
            "high": row["excess_95"][1] if "excess_95" in row else row[key],
        }
        for row in found
        if row.get(key) is not None
    ]
    tip = [alt.Tooltip("name:N", title="way"), alt.Tooltip("excess:Q", format="+.4f", title=title)]
    drawn = bars(rows, name="name", value="excess", title=title, tooltip=tip, color="G", low="low", high="high")
    table = Table(("way", title), [(row["name"], number(row["excess"], 3, sign=True)) for row in rows])
    return Figure("Ways to convert, before and after uptraining", record.conditions, drawn, table)


def _tasks(records: Sequence[Record]) -> list[Figure]:
    """A figure for each metric: models side by side."""
    made = []
    names = dict.fromkeys(name for record in records for name in record.results["metrics"])
    for name in names:
        rows, cells = [], []
        for record in records:
            found = record.results["metrics"].get(name)
            if found is None:
                continue
            model = _loss_row(record.configuration["model"], 0, 0)["model"]
            rows.append({"model": model, **{k: found[k] for k in ("value", "low", "high")}})
            difference = found.get("difference")
            cells.append(
                (
                    model,
                    number(found["value"]),
                    f"{found['low']:.3f} – {found['high']:.3f}",
                    "–" if difference is None else f"{difference['value']:+.3f} (p = {difference['p']:.3f})",
                )
            )
        word = name.replace("_", " ")
        tip = [alt.Tooltip("model:N"), alt.Tooltip("value:Q", format=".4f", title=word)]
        drawn = bars(rows, name="model", value="value", title=word, tooltip=tip, low="low", high="high")
        table = Table(("model", word, "95% interval", "against the other"), cells)
        less = any(r.results["metrics"].get(name, {}).get("lower_is_better") for r in records)
        title = f"{records[0].configuration['task']}: {word}" + (" (less is better)" if less else "")
        made.append(Figure(title, _from(records), drawn, table))
    return made


def _from(records: Sequence[Record]) -> str:
    return "; ".join(dict.fromkeys(record.conditions for record in records))
