"""Whole models in turns with other engines (``benchmarks/decode_engines.py``)."""

# ruff: noqa: E501

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from .form import LEVEL, Record, conditions, goal, ms, row, table

# Where the 80% quantile of times is so much above the 20%, something else ran.
UNSTEADY = 1.4


def _reading(case: Record, dtype: str) -> float:
    """Milliseconds that weights and cache take to be read: all of the floor at batch 1."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "engines"))
    import shape  # pyright: ignore[reportMissingImports]

    layer = sum(out * into for out, into in shape.LAYER.values()) + 2 * shape.HIDDEN
    weights = shape.LAYERS * layer + shape.HIDDEN + shape.VOCABULARY * shape.HIDDEN
    cache = 2 * shape.LAYERS * shape.KV_HEADS * shape.HEAD_DIM * case["prompt"] * case["batch"]
    return 1e3 * (weights + cache) * (4 if dtype == "float32" else 2) / case["bandwidth_bytes_per_second"]


def engines(record: Record, title: str = "Comparison with other engines") -> list[str]:
    rows, failed = [], []
    cases: dict[tuple[str, str, int, int], Record] = {}
    for pair in record["results"]["pairs"]:
        if "failed" in pair:
            failed.append(f"- {pair['engine']}, {pair['dtype']}: {pair['failed']}")
        for case in pair["cases"]:
            cases[pair["engine"], pair["dtype"], case["prompt"], case["batch"]] = case
            token = case["token_ms"]
            unsteady = any(times["p80"] > UNSTEADY * times["p20"] for times in token.values())
            floor = _reading(case, pair["dtype"])
            case["share"], case["unsteady"] = floor / token["regroup"]["p50"], unsteady
            rows.append(
                row(
                    pair["dtype"],
                    case["prompt"],
                    case["batch"],
                    pair["engine"],
                    ms(token[pair["engine"]]["p50"]),
                    f"**{ms(token['regroup']['p50'])}**",
                    f"{case['regroup_is_faster_by']:.2f}" + (" (unsteady)" if unsteady else ""),
                    f"{case['bandwidth_bytes_per_second'] / 1e9:.0f}",
                    ms(floor),
                    f"{case['share']:.0%}",
                )
            )
    versions = sorted(
        {pair["facts"][pair["engine"]]["version"] for pair in record["results"]["pairs"] if "facts" in pair}
    )
    goals = []
    for dtype in ("float32", "bfloat16"):
        for engine, prompt, least in (
            ("transformers", 512, 1.5),
            ("llama.cpp", 512, 1.2),
            ("openvino", 512, 1 / LEVEL),
            ("transformers", 2048, 2.5),
        ):
            case = cases.get((engine, dtype, prompt, 8))
            unsteady = case is not None and case["unsteady"]
            what = "as fast as" if engine == "openvino" else f"{least:g} times"
            goals.append(
                goal(
                    f"{dtype}, prompt {prompt}, batch 8: {what} {engine}",
                    "–"
                    if case is None
                    else f"{case['regroup_is_faster_by']:.2f}" + (" (unsteady)" if unsteady else ""),
                    None if case is None or unsteady else case["regroup_is_faster_by"] >= least,
                )
            )
        shares = [case["share"] for key, case in cases.items() if key[1:] == (dtype, 512, 1) and not case["unsteady"]]
        goals.append(
            goal(
                f"{dtype}, batch 1: 0.8 of the floor (reading)",
                "–"
                if not shares
                else f"median {statistics.median(shares):.2f} ({min(shares):.2f} to {max(shares):.2f})",
                None if not shares else statistics.median(shares) >= 0.8,
            )
        )
    return [
        f"## {title}",
        "",
        "A Llama shape of 1.1B parameters (hidden 2048, 22 layers, 32 heads of 64, 4 KV heads, random weights), milliseconds",
        "per step. Each row is a run of two engines in turns, for the same conditions: compare within rows. Weights, cache",
        "and arithmetic have one dtype; caches are filled first, everything is compiled and warm. `transformers` is",
        "`generate` with its defaults (sdpa, DynamicCache), `regroup` the same `generate` with",
        "`attn_implementation=\"regroup\"`, `KVCache` and `prepare_for_inference`.",
        "`reading` is the time to read weights and cache at the bandwidth of those minutes; arithmetic may take longer at",
        "batch 8. Rows with scattered times are `unsteady` and do not count for the goals.",
        f"{conditions(record)}; {'; '.join(versions)}.",
        "",
        "```sh",
        "python benchmarks/decode_engines.py --engine llama.cpp --dtype float32 --python ENGINES/bin/python \\",
        "  --models FOLDER --work pairs.jsonl -o benchmarks/records/decode-engines.json   # for each engine and dtype",
        "```",
        "",
        *table(("goal", "times faster", ""), goals),
        *table(("dtype", "prompt", "batch", "engine", "its ms", "regroup", "ratio", "GB/s", "reading, ms", "regroup: share"), rows),
        *(["Not measured:", "", *failed, ""] if failed else []),
    ]  # fmt: skip


def engines_avx2(record: Record) -> list[str]:
    """The same on a processor without AVX-512."""
    return [
        *engines(record, "Comparison with other engines, without AVX-512"),
        "This processor has AVX2 but not AVX-512. `prepare_for_inference` uses regroup's own kernel there (`DirectLinear`):",
        "oneDNN's packed layers are slow on such processors, and PyTorch emulates bfloat16 products.",
        "",
    ]
