"""One linear layer at a time (``benchmarks/linear.py``)."""

# ruff: noqa: E501

from __future__ import annotations

from .form import Record, conditions, row, table


def linear(record: Record) -> list[str]:
    done = record["configuration"]
    taken = ", ".join(f"`{layer}` in {dtype}" for dtype, layer in done["prepare_for_inference"].items())
    names = [
        name for name in ("linear", "mkl", "to_mkldnn", "packed", "direct") if name in record["results"]["layers"][0]
    ]
    rows = []
    for layer in record["results"]["layers"]:
        times = {name: layer[name]["milliseconds"] for name in names if name in layer}
        ours = min(times[name] for name in ("packed", "direct") if name in times)
        rows.append(
            row(
                layer["dtype"],
                layer["rows"],
                f"{layer['in']} → {layer['out']}",
                *(
                    "–"
                    if name not in times
                    else f"**{times[name]:.2f}**"
                    if times[name] == ours
                    else f"{times[name]:.2f}"
                    for name in names
                ),
                f"{times['linear'] / ours:.2f}",
            )
        )
    return [
        "## Linear layers",
        "",
        "One layer, milliseconds per call, weights read from memory: `linear` is `F.linear`, `mkl` and `to_mkldnn` are",
        "PyTorch's packed layouts, `packed` and `direct` are `PackedLinear` and `DirectLinear`; –: not on this processor.",
        f"`prepare_for_inference` uses {taken} here. {conditions(record)}.",
        "",
        "```sh",
        "python benchmarks/linear.py -o benchmarks/records/linear.json",
        "```",
        "",
        *table(("dtype", "rows", "layer", *names, "faster than linear"), rows),
    ]
