"""Where the heads are: what was converted, KV memory against context, G by layer, and how alike heads are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from ..errors import human_bytes, human_kv_heads
from .figures import COLORS, Figure, Section, Table, chart, points_and_lines
from .records import Record, labels

_CONTEXTS = [2**power for power in range(9, 18)]
_16_BIT = 2
_PAIRS = 6000  # of heads that are drawn


def models(records: Sequence[Record]) -> Section | None:
    """What was converted, and the memory of its cache, from `regroup inspect` and advice."""
    made: list[Figure] = []
    inspected = [record for record in records if record.kind == "inspect"]
    if inspected:
        made += [_facts(inspected), _memory(inspected)]
    for record in records:
        if record.kind in ("inspect", "advise", "plan"):
            made += _by_layer(record)
    if not made:
        return None
    return Section("models", "Models and their caches", "Arithmetic on shapes: exact.", made)


def similarity(records: Sequence[Record]) -> Section | None:
    """How alike KV heads are, from `regroup inspect --similarity`."""
    made = [
        figure
        for record in records
        if record.kind == "inspect" and record.results.get("similarity")
        for figure in _maps(record)
    ]
    if not made:
        return None
    words = "The share of two heads' energy that is lost if they share one, from the weights: at 0 they are alike."
    return Section("similarity", "How alike heads are", words, made)


def _name(record: Record) -> str:
    return _names([record])[0]


def _place(record: Record) -> str:
    return str(record.results.get("source", record.configuration.get("model", record.file)))


def _names(records: Sequence[Record]) -> list[str]:
    return labels([(_place(record), record.file) for record in records])


def _facts(records: Sequence[Record]) -> Figure:
    rows = []
    for name, record in zip(_names(records), records, strict=True):
        found, layers = record.results, record.results["layers"]
        heads = sorted({layer["num_key_value_heads"] for layer in layers})
        rows.append(
            (
                name,
                str(found.get("family")),
                "–" if found.get("parameters") is None else f"{found['parameters'] / 1e6:,.1f} M",
                str(len(layers)),
                str(max(layer["num_attention_heads"] for layer in layers)),
                str(heads[0]) if len(heads) == 1 else f"{heads[0]} – {heads[-1]}",
                human_bytes(sum(_token_bytes(layer) for layer in layers)),
            )
        )
    columns = (
        "model",
        "family",
        "parameters",
        "attention layers",
        "query heads",
        "KV heads",
        "KV cache per token, 16 bits",
    )
    return Figure("What was looked at", "; ".join(record.conditions for record in records), None, Table(columns, rows))


def _token_bytes(layer: dict[str, Any]) -> int:
    return 2 * layer["num_key_value_heads"] * layer["head_dim"] * _16_BIT


def _cache(layers: Sequence[dict[str, Any]], context: int) -> int:
    """Bytes of one sequence: a window keeps no more than its width."""
    return sum(_token_bytes(layer) * min(context, layer.get("window") or context) for layer in layers)


def _memory(records: Sequence[Record]) -> Figure:
    names = _names(records)
    rows = [
        {"model": name, "context": context, "bytes": _cache(record.results["layers"], context)}
        for name, record in zip(names, records, strict=True)
        for context in _CONTEXTS
    ]
    for row in rows:
        row["size"], row["MiB"] = human_bytes(row["bytes"]), row["bytes"] / 2**20
    tip = [alt.Tooltip("model:N"), alt.Tooltip("context:Q", format=","), alt.Tooltip("size:N")]
    x = alt.X(
        "context:Q",
        title="tokens in the cache",
        scale=alt.Scale(type="log", base=2),
        axis=alt.Axis(values=_CONTEXTS, labelExpr="datum.value < 1024 ? datum.value : datum.value / 1024 + 'k'"),
    )
    y = alt.Y("MiB:Q", title="MiB per sequence, 16 bits", scale=alt.Scale(type="log"), axis=alt.Axis(tickCount=6))
    drawn = points_and_lines(rows, x=x, y=y, color="model", tooltip=tip)
    shown = [512, 4096, 32768, 131072]
    cells = [
        (name, *(human_bytes(_cache(record.results["layers"], context)) for context in shown))
        for name, record in zip(names, records, strict=True)
    ]
    caption = "; ".join(record.conditions for record in records)
    return Figure("KV cache against context", caption, drawn, Table(("model", *(f"{c:,}" for c in shown)), cells))


def _by_layer(record: Record) -> list[Figure]:
    """KV heads of each layer, where they differ."""
    named: dict[str, list[tuple[str, int]]] = {}
    if record.kind == "advise":
        for row in record.results["candidates"]:
            named[row["name"]] = list(row["heads"].items())
    else:
        named[_name(record)] = [(layer["name"], layer["num_key_value_heads"]) for layer in record.results["layers"]]
    made = []
    for name, heads in named.items():
        if len({count for _, count in heads}) < 2:
            continue
        short = _short([layer for layer, _ in heads])
        rows = [
            {"layer": layer, "place": place, "KV heads": count}
            for (layer, count), place in zip(heads, short, strict=True)
        ]
        drawn = chart(
            alt.Chart(alt.Data(values=rows))
            .mark_bar(color=COLORS[0])
            .encode(
                x=alt.X("place:N", sort=None, title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)),
                y=alt.Y("KV heads:Q", axis=alt.Axis(tickMinStep=1, format="d")),
                tooltip=[alt.Tooltip("layer:N"), alt.Tooltip("KV heads:Q")],
            ),
            200,
        )
        table = Table(("layer", "KV heads"), [(layer, str(count)) for layer, count in heads])
        made.append(Figure(f"KV heads by layer: {name}", record.conditions, drawn, table))
    return made


def _short(names: Sequence[str]) -> list[str]:
    """Names without what they have in common, whole words of it: ``model.layers.3.self_attn`` becomes ``3``."""
    split = [name.split(".") for name in names]
    first = next((i for i, words in enumerate(zip(*split, strict=False)) if len(set(words)) > 1), 0)
    turned = [words[::-1] for words in split]
    last = next((i for i, words in enumerate(zip(*turned, strict=False)) if len(set(words)) > 1), 0)
    return [".".join(words[first : len(words) - last]) for words in split]


def _maps(record: Record) -> list[Figure]:
    """One map for keys and one for values, with a tile for each layer."""
    made = []
    for side in ("key", "value"):
        rows, cells = [], []
        layers = [layer for layer in record.results["similarity"] if layer.get(side)]
        if not layers:
            continue
        drawn_layers = _some(layers)
        short = dict(zip((layer["name"] for layer in layers), _short([layer["name"] for layer in layers]), strict=True))
        for layer in layers:
            found, pairs = layer[side], layer[side]["pairs"]
            if layer in drawn_layers:
                rows += [
                    {"layer": f"layer {short[layer['name']]}", "head": first, "with": second, "lost": round(value, 3)}
                    for first, row in enumerate(pairs)
                    for second, value in enumerate(row)
                ]
            apart = [value for first, row in enumerate(pairs) for second, value in enumerate(row) if first < second]
            if apart:
                cells.append(
                    (
                        layer["name"],
                        f"{min(apart):.3f}",
                        f"{sum(apart) / len(apart):.3f}",
                        *(f"{found['contiguous'][g]:.3f}" for g in found["contiguous"]),
                    )
                )
        groups = layers[0][side]["contiguous"]
        base = alt.Chart(alt.Data(values=rows)).mark_rect()
        maps = base.encode(
            x=alt.X("with:O", axis=None),
            y=alt.Y("head:O", axis=None),
            color=alt.Color(
                "lost:Q",
                title="energy lost",
                scale=alt.Scale(scheme="viridis", reverse=True),
                legend=alt.Legend(direction="horizontal", gradientLength=180),
            ),
            tooltip=[
                alt.Tooltip("layer:N"),
                alt.Tooltip("head:O"),
                alt.Tooltip("with:O"),
                alt.Tooltip("lost:Q", format=".3f", title="energy lost"),
            ],
        ).properties(width=120, height=120)
        drawn = maps.facet(facet=alt.Facet("layer:N", title=None, sort=None), columns=4).to_dict()
        columns = ("layer", "most similar", "mean", *(f"neighbours, {human_kv_heads(g)}" for g in groups))
        some = "" if len(drawn_layers) == len(layers) else f"{len(drawn_layers)} of {len(layers)} layers are drawn; "
        made.append(Figure(f"{_name(record)}: {side}s", some + record.conditions, drawn, Table(columns, cells)))
    return made


def _some(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Layers evenly spread, as many as have few enough pairs of heads for a page that is quick to open."""
    each = max(1, max((layer["num_key_value_heads"] ** 2 for layer in layers), default=1))
    count = max(1, min(len(layers), _PAIRS // each))
    return [layers[(2 * place + 1) * len(layers) // (2 * count)] for place in range(count)]
