"""The operator alone, over a grid of shapes (``regroup bench attention``)."""

# ruff: noqa: E501

from __future__ import annotations

import math
import statistics

from .form import LEVEL, Record, conditions, goal, ms, row, table

DISTURBED = 0.1  # of the processors
LARGE = 100_000_000  # bytes of keys and values
WAYS = ("regroup cpu", "regroup packed", "enable_gqa", "packed_sdpa", "repeat")


def _ways(shape: Record) -> dict[str, float]:
    return {name: way["ms"]["p50"] for name, way in shape["ways"].items() if "ms" in way}


def _rivals(shape: Record) -> dict[str, float]:
    """PyTorch's own ways; with as many KV heads as heads they are one."""
    return {name: time for name, time in _ways(shape).items() if not name.startswith("regroup")}


def _bandwidth_share(shape: Record, way: str) -> float:
    return shape["kv_bytes"] / shape["bandwidth_bytes_per_second"] / (_ways(shape)[way] / 1e3)


def _product_share(shape: Record, way: str) -> float:
    return shape["flops"] / shape["product_flops_per_second"] / (_ways(shape)[way] / 1e3)


def operator_table(shapes: list[Record]) -> list[str]:
    rows = []
    for shape in shapes:
        ways = _ways(shape)
        rows.append(
            row(
                shape["dtype"],
                shape["batch"],
                f"{shape['context']:,}",
                shape["kv_heads"],
                f"{shape['kv_bytes'] / 1e6:.0f}",
                ms(shape["floor_ms"]),
                f"**{ms(ways['regroup'])}** ({shape['auto_takes']})",
                f"{shape['floor_ms'] / ways['regroup']:.0%}",
                *(ms(ways[name]) if name in ways else "–" for name in WAYS),
            )
        )
    return table(
        ("dtype", "batch", "context", "G", "KV, MB", "floor", "regroup", "of the floor", *WAYS), rows
    )  # fmt: skip


def operator_goals(shapes: list[Record]) -> list[str]:
    large = [shape for shape in shapes if shape["dtype"] == "float32" and shape["kv_bytes"] >= LARGE]
    rows = []
    for count, least in ((32, 0.85), (8, 0.60), (4, 0.50)):
        shares = [_bandwidth_share(shape, "regroup") for shape in large if shape["kv_heads"] == count]
        rows.append(_share_goal(f"float32, at least 100 MB, G = {count}: {least:.0%} of the bandwidth", shares, least))
    shares = [_product_share(shape, "regroup") for shape in large if shape["kv_heads"] == 1]
    rows.append(_share_goal("the same, G = 1: half of the rate of such a product", shares, 0.5))
    slower = [
        (time, shape) for shape in shapes if (time := _ways(shape)["regroup"] / min(_rivals(shape).values())) > LEVEL
    ]
    worst = max((time for time, _ in slower), default=1.0)
    rows.append(
        goal(
            "never slower than `enable_gqa`, repeating + SDPA or packed SDPA",
            f"slower by more than {LEVEL - 1:.0%} in {len(slower)} of {len(shapes)} shapes"
            + (f", at worst {worst:.2f} times" if slower else ""),
            not slower,
        )
    )
    for count, least in ((8, 2.0), (1, 4.0)):
        ratios = [
            _ways(shape)["enable_gqa"] / _ways(shape)["regroup"] for shape in shapes if shape["kv_heads"] == count
        ]
        reached = None if not ratios else min(ratios) >= least
        found = f"{min(ratios):.1f} to {max(ratios):.1f}, median {statistics.median(ratios):.1f}" if ratios else "–"
        rows.append(goal(f"{least:g} times faster than `enable_gqa` at G = {count}", found, reached))
    return table(("goal", "found", ""), rows)


def _share_goal(what: str, shares: list[float], least: float) -> str:
    if not shares:
        return goal(what, "–", None)
    found = f"{min(shares):.0%} to {max(shares):.0%}, median {statistics.median(shares):.0%}, of {len(shares)} shapes"
    return goal(what, found, min(shares) >= least)


def operator(record: Record, title: str = "The operator", file: str = "attention-cpu") -> list[str]:
    found = [shape for shape in record["results"]["shapes"] if "ways" in shape]
    shapes = [shape for shape in found if (shape["other_processes_share_of_cpu"] or 0) <= DISTURBED]
    done = record["configuration"]
    whole = math.prod(len(done[name]) for name in ("kv_heads", "batch", "context", "dtype"))
    left_out = [shape for shape in record["results"]["shapes"] if "left_out" in shape]
    return [
        f"## {title}",
        "",
        "One decoding step of one layer, 32 query heads of 128, milliseconds, medians of runs in turns. `regroup` is the",
        "choice of `backend=\"auto\"`: \"cpu\" is the compiled kernel, \"packed\" uses PyTorch only; `enable_gqa` is",
        "`scaled_dot_product_attention(enable_gqa=True)`, `packed_sdpa` the same with the heads of a group folded into",
        "the query length, `repeat` with KV heads repeated first. More than 100% of the floor: products faster than",
        f"PyTorch's. {conditions(record)}.",
        "",
        "```sh",
        "regroup bench attention --batch 1,8,32 --context 1024,4096,16384 --dtype float32,bfloat16 \\",
        f"  --work pieces.jsonl -o benchmarks/records/{file}.json",
        "```",
        "",
        *operator_goals(shapes),
        *operator_table(shapes),
        f"{len(found) - len(shapes)} of {len(found)} shapes were disturbed by other processes and are not shown; "
        f"{whole - len(found) - len(left_out)} of the grid have not been measured yet. "
        f"{len(left_out)} shapes with more than {record['configuration']['limit_bytes'] / 1e9:g} GB of keys and values "
        "were omitted. FlexAttention compiles for each shape and is omitted here (`--flex`).",
        "",
    ]  # fmt: skip


def operator_avx2(record: Record) -> list[str]:
    return operator(record, "The operator, without AVX-512", "attention-cpu-avx2")
