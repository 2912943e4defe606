"""Figure 4 and appendix A, from a record of the paper's experiments."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt

from .figures import Figure, Section, Table, bars, number
from .records import Record

_LOSS = "held-out loss, nats per token"


def section(records: Sequence[Record]) -> Section | None:
    """Ways to merge, and spread over seeds."""
    made: list[Figure] = []
    for record in records:
        if record.kind != "paper":
            continue
        for family in ("encoder-decoder", "decoder"):
            if family not in record.results:
                continue
            tuned = family == "encoder-decoder"
            spread_of = ("average", "right answers, average share") if tuned else ("nats_per_token", _LOSS)
            for key, name, words, (measure, title) in (
                ("figure_4", "method", "Figure 4: ways to merge to one KV head", ("nats_per_token", _LOSS)),
                ("appendix_a", "model", "Appendix A: spread over seeds", spread_of),
            ):
                rows = []
                for row in record.results[family][key]:
                    mean, spread = row[measure]["mean"], row[measure]["standard_deviation"] or 0
                    rows.append({"name": row[name], "value": mean, "low": mean - spread, "high": mean + spread})
                tip = [alt.Tooltip("name:N", title=name), alt.Tooltip("value:Q", format=".4f", title=title)]
                drawn = bars(rows, name="name", value="value", title=title, tooltip=tip, low="low", high="high")
                cells = [(r["name"], f"{r['value']:.4f} ± {number(r['high'] - r['value'], 4)}") for r in rows]
                made.append(Figure(f"{words}, {family}", record.conditions, drawn, Table((name, title), cells)))
    if not made:
        return None
    return Section("paper", "The paper's experiments", "Mean and standard deviation over seeds.", made)
