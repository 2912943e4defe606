"""Loss against tokens of uptraining."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from ..errors import human_kv_heads
from .figures import COUNTS, Figure, Section, Table, number, points_and_lines
from .records import Record

_TOKENS = alt.X("tokens:Q", title="uptraining tokens", axis=alt.Axis(labelExpr=COUNTS, tickCount=6))


def section(records: Sequence[Record]) -> Section | None:
    """Uptraining, from runs and from tables of runs."""
    made: list[Figure] = []
    for record in records:
        if record.kind == "uptraining-curve":
            made += _curves(record)
        elif record.kind == "uptrain":
            made.append(_run(record))
        elif record.kind == "paper":
            made += _proportions(record)
    if not made:
        return None
    return Section("uptraining", "Uptraining", "What training after the conversion recovers.", made)


def _curves(record: Record) -> list[Figure]:
    made = []
    title = "loss over the original model, nats per token"
    table = record.results["table"]
    for heads in dict.fromkeys(row["num_key_value_heads"] for row in table):
        own = [row for row in table if row["num_key_value_heads"] == heads]
        rows = [
            {
                "way": row["way"],
                "tokens": row["tokens"],
                "loss": row["excess_nats_per_token"],
                "low": row["excess_nats_per_token"] - (row["standard_deviation"] or 0),
                "high": row["excess_nats_per_token"] + (row["standard_deviation"] or 0),
                "seeds": row["seeds"],
            }
            for row in own
        ]
        tip = [
            alt.Tooltip("way:N"),
            alt.Tooltip("tokens:Q", format=","),
            alt.Tooltip("loss:Q", format="+.4f"),
            alt.Tooltip("seeds:Q"),
        ]
        # An excess of zero, or a spread that reaches it, has no logarithm.
        straight = any(row["low"] <= 0 for row in rows)
        y = alt.Y("loss:Q", title=title, scale=alt.Scale() if straight else alt.Scale(type="log"))
        x = alt.X(
            "tokens:Q",
            title="uptraining tokens",
            scale=alt.Scale(type="symlog", constant=50_000),
            axis=alt.Axis(labelExpr=COUNTS, labelOverlap=True, values=sorted({row["tokens"] for row in own})),
        )
        drawn = points_and_lines(rows, x=x, y=y, color="way", tooltip=tip, low="low", high="high", height=340)
        counts = sorted({row["tokens"] for row in own})
        cells = []
        for way in dict.fromkeys(row["way"] for row in own):
            at = {row["tokens"]: row for row in rows if row["way"] == way}
            cells.append((way, *(number(at[c]["loss"], 3, sign=True) if c in at else "–" for c in counts)))
        made.append(
            Figure(
                f"{record.configuration['parent']}, {human_kv_heads(heads)}",
                f"mean and spread over seeds; {record.conditions}",
                drawn,
                Table(("way", *(f"{count:,}" for count in counts)), cells),
            )
        )
    return made


def _run(record: Record) -> Figure:
    """One run: losses of training and of held-out text."""
    per_step = record.configuration["budget"]["tokens_per_step"]
    rows = []
    for entry in record.results["history"]:
        for key, name in (("loss", "training"), ("eval_loss", "held out"), ("eval_kl", "KL to the teacher, held out")):
            if entry.get(key) is not None:
                rows.append({"what": name, "tokens": entry["step"] * per_step, "loss": entry[key]})
    tip = [alt.Tooltip("what:N"), alt.Tooltip("tokens:Q", format=","), alt.Tooltip("loss:Q", format=".4f")]
    y = alt.Y("loss:Q", title="nats per token", scale=alt.Scale(zero=False))
    drawn = points_and_lines(rows, x=_TOKENS, y=y, color="what", tooltip=tip)
    facts = [
        ("tokens", f"{record.results['tokens']:,}"),
        ("α", number(record.results["alpha"], 4) if record.results.get("alpha") else "–"),
        ("FLOPs", f"{record.results['flops']:.2e}"),
        ("tokens per second", number(record.results["tokens_per_second"], 0)),
        ("spikes", str(record.results["spikes"])),
    ]
    for key, name in (("eval_loss", "held-out loss"), ("eval_kl", "KL to the teacher")):
        if f"first_{key}" in record.results:
            first, last = record.results[f"first_{key}"], record.results[f"last_{key}"]
            facts.append((name, f"{first:.4f} → {last:.4f}"))
    model = str(record.configuration["model"]).rpartition("/")[2]
    return Figure(f"The run of {model}", record.conditions, drawn, Table(("", ""), facts))


def _proportions(record: Record) -> list[Figure]:
    """Figure 5, of both families."""
    made = []
    for family, measure, title in (
        ("encoder-decoder", "nats_per_token", "held-out loss, nats per target token"),
        ("decoder", "nats_per_token", "held-out loss, nats per token"),
    ):
        if family not in record.results:
            continue
        rows = []
        for row in record.results[family]["figure_5"]:
            mean, spread = row[measure]["mean"], row[measure]["standard_deviation"] or 0
            name = "MQA" if row["num_key_value_heads"] == 1 else f"GQA-{row['num_key_value_heads']}"
            way = "ours" if row["method"] == "ours" else "the paper's"
            rows.append(
                {
                    "way": f"{name}, {way}",
                    "alpha": row["alpha"],
                    "value": mean,
                    "low": mean - spread,
                    "high": mean + spread,
                }
            )
        tip = [alt.Tooltip("way:N"), alt.Tooltip("alpha:Q", title="α"), alt.Tooltip("value:Q", format=".4f")]
        x, y = alt.X("alpha:Q", title="α"), alt.Y("value:Q", title=title, scale=alt.Scale(zero=False))
        drawn = points_and_lines(rows, x=x, y=y, color="way", tooltip=tip, low="low", high="high")
        cells = [(row["way"], f"{row['alpha']:g}", number(row["value"], 4)) for row in rows]
        made.append(
            Figure(
                f"Figure 5, {family}: quality against α",
                f"mean and spread over seeds; {record.conditions}",
                drawn,
                Table(("way", "α", title), cells),
            )
        )
    return made
