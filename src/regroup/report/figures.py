"""What sections are made of: a chart, what it shows, and the same figures as a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

# Okabe and Ito's colours, which the colour-blind can tell apart, in an order that begins with the calm ones.
COLORS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6d31", "#7f7f7f"]
HEIGHT = 300
# 65536 is 66k, and a million 1M.
COUNTS = (
    "datum.value >= 1e6 ? format(datum.value / 1e6, '.3~g') + 'M' : "
    "datum.value >= 1e3 ? format(datum.value / 1e3, '.3~g') + 'k' : datum.value"
)


@dataclass(frozen=True)
class Table:
    """Columns and rows of text."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """One figure of the page.

    Attributes:
        title: what is compared.
        caption: from which records, when, on what.
        chart: a Vega-Lite specification, or None where a table says it all.
        table: the figures that the chart draws.
    """

    title: str
    caption: str
    chart: dict[str, Any] | None
    table: Table


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    name: str
    title: str
    words: str
    figures: Sequence[Figure]


def chart(layers: alt.Chart | alt.LayerChart | alt.FacetChart, height: int = HEIGHT) -> dict[str, Any]:
    """A chart as wide as its place, as plain data."""
    made: Any = layers
    return made.properties(width="container", height=height).to_dict()


def points_and_lines(
    rows: Sequence[dict[str, Any]],
    *,
    x: alt.X,
    y: alt.Y,
    color: str,
    tooltip: Sequence[alt.Tooltip],
    low: str | None = None,
    high: str | None = None,
    height: int = HEIGHT,
) -> dict[str, Any]:
    """Lines through points, one a colour, with whiskers where there are bounds."""
    base = alt.Chart(alt.Data(values=list(rows)))
    spoken: Any = y.to_dict()
    title = spoken["title"]
    hue = alt.Color(f"{color}:N", scale=alt.Scale(range=COLORS), title=None, sort=None)
    # What is hovered over is found from farther away than its mark is wide.
    marks: list[alt.Chart] = [
        base.mark_line().encode(x=x, y=y, color=hue),
        base.mark_point(filled=True, size=70, opacity=1).encode(x=x, y=y, color=hue, tooltip=list(tooltip)),
    ]
    if low is not None and high is not None:
        bounds = base.mark_rule(strokeWidth=1.5).encode(
            x=x, y=alt.Y(f"{low}:Q", title=title), y2=f"{high}:Q", color=hue
        )
        marks.insert(1, bounds)
    return chart(alt.layer(*marks), height)


def bars(
    rows: Sequence[dict[str, Any]],
    *,
    name: str,
    value: str,
    title: str,
    tooltip: Sequence[alt.Tooltip],
    color: str | None = None,
    low: str | None = None,
    high: str | None = None,
) -> dict[str, Any]:
    """Horizontal bars, a row each, with whiskers where there are bounds."""
    base = alt.Chart(alt.Data(values=list(rows)))
    y = alt.Y(f"{name}:N", sort=None, title=None)
    hue = alt.value(COLORS[0])
    if color is not None:
        hue = alt.Color(f"{color}:N", scale=alt.Scale(range=COLORS), title=None, sort=None)
    marks: list[alt.Chart] = [
        base.mark_bar(height={"band": 0.65}).encode(
            y=y, x=alt.X(f"{value}:Q", title=title), color=hue, tooltip=list(tooltip)
        )
    ]
    if low is not None and high is not None:
        marks.append(
            base.mark_rule(strokeWidth=1.5, color="gray").encode(y=y, x=alt.X(f"{low}:Q", title=title), x2=f"{high}:Q")
        )
    return chart(alt.layer(*marks), max(80, 26 * len({row[name] for row in rows})))


def number(value: float | None, digits: int = 3, *, sign: bool = False) -> str:
    """For a table: enough digits, thousands apart, a dash for nothing."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
