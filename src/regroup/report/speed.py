"""How fast decoding is: by KV heads, compared with other engines, and against quality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from ..errors import human_bytes, human_kv_heads
from .figures import COLORS, Figure, Section, Table, bars, chart, number, points_and_lines
from .records import Record

_HEADS = alt.X(
    "kv_heads:Q", title="KV heads", scale=alt.Scale(type="log", base=2), axis=alt.Axis(format="d", tickCount=6)
)


def section(records: Sequence[Record]) -> Section | None:
    """Speed, from benchmarks."""
    made: list[Figure] = []
    for record in records:
        if record.kind == "benchmark/decode":
            made.append(_decode(record))
        elif record.kind == "benchmark/attention":
            made.append(_attention(record))
        elif record.kind == "benchmark/decode-engines":
            made.append(_engines(record))
    if not made:
        return None
    words = "Measured time, and the least time that its bytes and its arithmetic take on the same machine (the floor)."
    return Section("speed", "Speed", words, made)


def trade_off(records: Sequence[Record]) -> Section | None:
    """Quality against time, with the Pareto front."""
    made = [_advice(record) for record in records if record.kind == "advise"]
    made += [figure for record in records if record.kind == "paper" for figure in _paper(record)]
    made = [figure for figure in made if figure.table.rows]
    if not made:
        return None
    words = "Down and to the left is better. Nothing beats what lies on the dashed front in both time and quality."
    return Section("trade-off", "Quality against speed", words, made)


def _decode(record: Record) -> Figure:
    done = record.configuration
    rows, cells = [], []
    for model in record.results["models"]:
        if model["kv_heads"] is None:
            continue
        for way in ("regroup", "transformers"):
            if way in model:
                time = model[way]["token_ms"]
                rows.append(
                    {
                        "kv_heads": model["kv_heads"],
                        "way": way,
                        "ms": time["p50"],
                        "low": time["p20"],
                        "high": time["p80"],
                    }
                )
        rows.append(
            {
                "kv_heads": model["kv_heads"],
                "way": "floor",
                "ms": model["floor_ms"],
                "low": model["floor_ms"],
                "high": model["floor_ms"],
            }
        )
        cells.append(
            (
                str(model["kv_heads"]),
                *(
                    number(model[way]["token_ms"]["p50"], 1) if way in model else "–"
                    for way in ("regroup", "transformers")
                ),
                number(model["floor_ms"], 1),
                human_bytes(model["predicted_cache_bytes"]),
            )
        )
    tip = [alt.Tooltip("way:N"), alt.Tooltip("kv_heads:Q", title="KV heads"), alt.Tooltip("ms:Q", format=".2f")]
    y = alt.Y("ms:Q", title="milliseconds per token")
    drawn = points_and_lines(rows, x=_HEADS, y=y, color="way", tooltip=tip, low="low", high="high")
    table = Table(("KV heads", "regroup, ms", "transformers, ms", "floor, ms", "cache"), cells)
    title = f"{done['model']}: batch {done['batch']}, prompt {done['prompt']}, {done['dtype']}"
    return Figure(title, f"medians, whiskers 20 to 80%; {record.conditions}", drawn, table)


def _attention(record: Record) -> Figure:
    """How many times faster the operator is than PyTorch's own way, by bytes of keys and values."""
    rows = []
    for shape in record.results["shapes"]:
        ways = shape.get("ways", {})
        ours, stock = (ways.get(way, {}).get("ms") for way in ("regroup", "enable_gqa"))
        if ours is None or stock is None:
            continue
        rows.append(
            {
                "heads": f"{human_kv_heads(shape['kv_heads'])}, {shape['dtype']}",
                "megabytes": shape["kv_bytes"] / 1e6,
                "times": stock["p50"] / ours["p50"],
                "what": f"batch {shape['batch']}, context {shape['context']:,}",
                "ms": ours["p50"],
            }
        )
    title = "times faster than enable_gqa"
    tip = [
        alt.Tooltip("heads:N", title="shape"),
        alt.Tooltip("what:N", title=" "),
        alt.Tooltip("times:Q", format=".2f", title=title),
        alt.Tooltip("ms:Q", format=".2f"),
    ]
    drawn = chart(
        alt.Chart(alt.Data(values=rows))
        .mark_point(filled=True, size=60, opacity=0.9)
        .encode(
            x=alt.X(
                "megabytes:Q", title="keys and values, MB", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6)
            ),
            y=alt.Y("times:Q", title=title, scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6)),
            color=alt.Color("heads:N", scale=alt.Scale(range=COLORS), title=None, sort=None),
            tooltip=tip,
        )
    )
    cells = [(row["heads"], row["what"], number(row["ms"], 2), number(row["times"], 2)) for row in rows]
    table = Table(("KV heads", "shape", "ms", title), cells)
    return Figure("Attention alone, one decoding step", record.conditions, drawn, table)


def _engines(record: Record) -> Figure:
    rows = []
    for pair in record.results["pairs"]:
        for case in pair["cases"]:
            ratio = case["regroup_is_faster_by"]
            name = f"{pair['engine']}, {pair['dtype']}, batch {case['batch']}, prompt {case['prompt']}"
            rows.append({"name": name, "ratio": ratio, "engine": pair["engine"]})
    tip = [alt.Tooltip("name:N", title="compared with"), alt.Tooltip("ratio:Q", format=".2f", title="times faster")]
    drawn = bars(rows, name="name", value="ratio", title="regroup is so many times faster", tooltip=tip, color="engine")
    table = Table(
        ("compared with", "regroup is so many times faster"), [(r["name"], number(r["ratio"], 2)) for r in rows]
    )
    return Figure("Compared with other engines, in turns", record.conditions, drawn, table)


def _advice(record: Record) -> Figure:
    candidates = record.results["candidates"]
    key = next((k for k in ("loss_after", "loss", "energy") if candidates[0].get(k) is not None), None)
    titles = {
        "loss_after": "loss after uptraining, nats per token",
        "loss": "loss, nats per token",
        "energy": "energy lost",
    }
    rows = [
        {
            "name": row["name"],
            "ms": 1e3 * row["token_seconds"],
            "value": row[key] if key else None,
            "low": row.get(f"{key}_low") if row.get(f"{key}_low") is not None else row[key] if key else None,
            "high": row.get(f"{key}_high") if row.get(f"{key}_high") is not None else row[key] if key else None,
            "front": row["pareto"],
            "kind": "chosen"
            if row["name"] == record.results["chosen"]
            else "by layer"
            if row["kv_heads"] is None
            else "uniform",
        }
        for row in candidates
    ]
    cells = [
        (
            row["name"],
            human_bytes(row["memory_bytes"]),
            f"{row['largest_batch']:,}",
            number(1e3 * row["token_seconds"], 2),
            number(row[key]) if key else "–",
        )
        for row in candidates
    ]
    asked = record.configuration
    title = f"{asked['model']} on {asked['hardware']}: batch {asked['batch']}, context {asked['context']:,}"
    table = Table(("", "memory", "largest batch", "ms per token", titles[key] if key else "loss"), cells)
    words = f"predicted; recommended: {record.results['chosen']}; {record.conditions}"
    return Figure(title, words, _front(rows, titles[key]) if key else None, table)


def _front(rows: Sequence[dict[str, Any]], title: str, what: str = "token") -> dict[str, Any]:
    x, y = (
        alt.X("ms:Q", title=f"milliseconds per {what}", scale=alt.Scale(zero=False, padding=30)),
        alt.Y("value:Q", title=title),
    )
    base = alt.Chart(alt.Data(values=list(rows)))
    hue = alt.Color("kind:N", scale=alt.Scale(range=COLORS), title=None, sort=None)
    front = alt.Chart(alt.Data(values=[row for row in rows if row["front"]]))
    return chart(
        alt.layer(
            front.mark_line(strokeDash=[5, 4], color="gray").encode(x=x, y=y),
            base.mark_rule(strokeWidth=1.5).encode(x=x, y=alt.Y("low:Q", title=title), y2="high:Q", color=hue),
            base.mark_point(filled=True, size=80, opacity=1).encode(
                x=x,
                y=y,
                color=hue,
                tooltip=[
                    alt.Tooltip("name:N"),
                    alt.Tooltip("ms:Q", format=".3f"),
                    alt.Tooltip("value:Q", format=".4f", title=title),
                ],
            ),
        ),
        340,
    )


def _paper(record: Record) -> list[Figure]:
    """Table 1 of each family as Figure 3 draws it; what is lost goes down, so errors are shown."""
    made = []
    for family, measure, title in (
        ("encoder-decoder", "average", "answers that are wrong, share"),
        ("decoder", "nats_per_token", "held-out loss, nats per token"),
    ):
        if family not in record.results:
            continue
        rows = []
        for row in record.results[family]["table_1"]:
            found = row[measure]
            turned = -1 if measure == "average" else 1
            value = (1 if turned < 0 else 0) + turned * found["mean"]
            spread = found["standard_deviation"] or 0.0
            rows.append(
                {
                    "name": row["model"],
                    "ms": 1e3 * row["seconds_per_sample"]["p50"],
                    "value": value,
                    "low": value - spread,
                    "high": value + spread,
                    "kind": "ours" if row["model"].endswith("ours") else "the paper's",
                }
            )
        for row in rows:
            row["front"] = not any(o["ms"] <= row["ms"] and o["value"] <= row["value"] and o is not row for o in rows)
        rows.sort(key=lambda row: row["ms"])
        cells = [
            (row["name"], number(row["ms"], 2), f"{row['value']:.4f} ± {row['high'] - row['value']:.4f}")
            for row in rows
        ]
        table = Table(("model", "ms per sample", title), cells)
        drawn = _front(rows, title, "sample")
        made.append(Figure(f"Table 1, {family}", f"mean and spread over seeds; {record.conditions}", drawn, table))
    return made
