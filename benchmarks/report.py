"""docs/benchmarks.md from the records: run it after a record was made anew.

python benchmarks/report.py            # rewrites the page
python benchmarks/report.py --check    # says whether the page is what the records say
"""

# ruff: noqa: E501

from __future__ import annotations

import json
import math
import statistics
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

ROOT = Path(__file__).parents[1]
RECORDS = ROOT / "benchmarks/records"
PAGE = ROOT / "docs/benchmarks.md"

# Noise of two medians of one run: what is slower by less counts as level.
LEVEL = 1.05
# Where the 80% quantile of times is so much above the 20%, something else ran.
UNSTEADY = 1.4
DISTURBED = 0.1  # of the processors
LARGE = 100_000_000  # bytes of keys and values

Record = dict[str, Any]


def row(*cells: object) -> str:
    return "| " + " | ".join(str(cell) for cell in cells) + " |"


def table(heading: tuple[str, ...], rows: list[str]) -> list[str]:
    return [row(*heading), row(*("---" for _ in heading)), *rows, ""]


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def conditions(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    instructions = f" with {machine['instructions']}" if "instructions" in machine else ""
    return (
        f"{machine['processor']}{instructions}, {machine['threads']} threads, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {record['date'][:10]}"
    )


def goal(what: str, found: str, reached: bool | None) -> str:
    return row(what, found, {True: "reached", False: "**not reached**", None: "not decided"}[reached])


# ---- the operator ----------------------------------------------------------------------------------------------------


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


WAYS = ("regroup cpu", "regroup packed", "enable_gqa", "packed_sdpa", "repeat")


def operator_goals(shapes: list[Record]) -> list[str]:
    large = [shape for shape in shapes if shape["dtype"] == "float32" and shape["kv_bytes"] >= LARGE]
    rows = []
    for count, least in ((32, 0.85), (8, 0.60), (4, 0.50)):
        shares = [_bandwidth_share(shape, "regroup") for shape in large if shape["kv_heads"] == count]
        rows.append(_share_goal(f"float32, 100 MB and more, G = {count}: {least:.0%} of the bandwidth", shares, least))
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
        "choice of `backend=\"auto\"`, with \"cpu\" the compiled kernel and with \"packed\" PyTorch alone; `enable_gqa` is",
        "`scaled_dot_product_attention(enable_gqa=True)`, `packed_sdpa` the same with the heads of a group folded into",
        "the query length, `repeat` with KV heads repeated first. More than 100% of the floor is a product faster than",
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
        f"{whole - len(found) - len(left_out)} of the grid are not measured yet. "
        f"{len(left_out)} shapes with more than {record['configuration']['limit_bytes'] / 1e9:g} GB of keys and values "
        "were left out. FlexAttention compiles anew for each shape and is left out here (`--flex`).",
        "",
    ]  # fmt: skip


# ---- engines ---------------------------------------------------------------------------------------------------------


def _reading(case: Record, dtype: str) -> float:
    """Milliseconds that weights and cache take to be read: all of the floor at batch 1."""
    sys.path.insert(0, str(Path(__file__).with_name("engines")))
    import shape  # pyright: ignore[reportMissingImports]

    layer = sum(out * into for out, into in shape.LAYER.values()) + 2 * shape.HIDDEN
    weights = shape.LAYERS * layer + shape.HIDDEN + shape.VOCABULARY * shape.HIDDEN
    cache = 2 * shape.LAYERS * shape.KV_HEADS * shape.HEAD_DIM * case["prompt"] * case["batch"]
    return 1e3 * (weights + cache) * (4 if dtype == "float32" else 2) / case["bandwidth_bytes_per_second"]


def engines(record: Record, title: str = "Beside other engines") -> list[str]:
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
            what = "level with" if engine == "openvino" else f"{least:g} times"
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
        "A Llama shape of 1.1B parameters (hidden 2048, 22 layers, 32 heads of 64, G = 4, random weights), milliseconds a",
        "step. Each row is a run of two engines in turns, so that both meet the same machine: compare within rows. Weights,",
        "cache and arithmetic are of one dtype; caches are full before, everything is compiled and warm. `transformers` is",
        "`generate` as it is by default (sdpa, DynamicCache), `regroup` the same `generate` with",
        "`attn_implementation=\"regroup\"`, `KVCache` and `prepare_for_inference`.",
        "`reading` is what weights and cache take to be read at the bandwidth of those minutes; arithmetic may take longer",
        "at batch 8. Rows whose times scatter are `unsteady` and decide nothing.",
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


# ---- whole models by G -----------------------------------------------------------------------------------------------


def by_groups(record: Record) -> list[str]:
    rows = []
    for model in record["results"]["models"]:
        ours, theirs = model["regroup"], model.get("transformers")
        allowed = model.get("floor_speedup_over_mha")
        rows.append(
            row(
                model["kv_heads"],
                ms(model["floor_ms"]),
                f"**{ms(ours['token_ms']['p50'])}** ({ms(ours['token_ms']['p20'])} to {ms(ours['token_ms']['p80'])})",
                f"{ours['fraction_of_the_ceiling']:.0%}",
                f"{ours['speedup_over_mha']:.2f}" if allowed else "–",
                f"{allowed:.2f}" if allowed else "–",
                f"{ours['speedup_over_mha'] / allowed:.0%}" if allowed else "–",
                "–" if theirs is None else ms(theirs["token_ms"]["p50"]),
                f"{ours['cache_bytes'] / 1e6:.0f}",
            )
        )
    return table(
        ("G", "floor", "regroup, ms", "of the floor", "over MHA", "allowed", "share", "transformers, ms", "cache, MB"),
        rows,
    )


def _layers(record: Record) -> str:
    model = record["results"]["models"][0]
    whole = model["layers_of_the_model"]
    return f"all {whole} layers" if model["layers"] == whole else f"{model['layers']} of {whole} layers"


def t5(record: Record, title: str = "T5-Large's decoder") -> list[str]:
    lines = [
        f"## {title}",
        "",
        "16 heads, 2048 encoded tokens, float32, random weights, milliseconds a step; the encoder is not run. `allowed` is",
        "the ratio of the floors, `share` how much of it is reached.",
        "",
        "```sh",
        "regroup bench decode benchmarks/shapes/t5-large.json --kv-heads 16,8,4,1 --batch 8 --prompt 2048 --baseline -o RUN.json",
        "python benchmarks/join_decode.py RUN.json … -o benchmarks/records/decode-t5-large.json",
        "```",
        "",
    ]
    rows, tables = [], []
    for part in record["results"]["runs"]:
        batch = part["configuration"]["batch"]
        tables += [f"Batch {batch}, {_layers(part)}; {conditions(part)}:", "", *by_groups(part)]
        for model in part["results"]["models"]:
            if (allowed := model.get("floor_speedup_over_mha")) is None or model["kv_heads"] == 16:
                continue
            share = model["regroup"]["speedup_over_mha"] / allowed
            what = f"batch {batch}, G = {model['kv_heads']}: 80% of the speed-up that the floor allows"
            rows.append(goal(what, f"{share:.0%}", share >= 0.8))
    return lines + table(("goal", "found", ""), rows) + tables


def llama(record: Record) -> list[str]:
    done = record["configuration"]
    return [
        "## Time against the number of groups",
        "",
        "The paper's Figure 6 for the Llama shape of 1.1B parameters, "
        f"batch {done['batch']}, prompt {done['prompt']:,}, {done['dtype']},",
        f"{_layers(record)}, random weights. {conditions(record)}.",
        "",
        "```sh",
        f"regroup bench decode benchmarks/shapes/llama-1.1b.json --kv-heads 32,8,4,1 --batch {done['batch']} --prompt {done['prompt']} "
        f"--new {done['new']} \\",
        f"  --dtype {done['dtype']} --plot docs/images/decode-groups.png -o benchmarks/records/decode-llama-1b.json",
        "```",
        "",
        "![milliseconds a token against KV heads](images/decode-groups.png)",
        "",
        *by_groups(record),
    ]


def t5_xxl(record: Record) -> list[str]:
    done = record["configuration"]
    return [
        "## Time against the number of groups: T5-XXL's decoder",
        "",
        f"The paper's Figure 6 (64 heads of 64), batch {done['batch']}, {done['prompt']:,} encoded tokens, {done['dtype']}, "
        f"{_layers(record)}, random weights. {conditions(record)}.",
        "",
        "```sh",
        f"regroup bench decode benchmarks/shapes/t5-xxl.json --kv-heads 64,32,16,8,4,2,1 --batch {done['batch']} \\",
        f"  --prompt {done['prompt']} --new {done['new']} --layers {done['layers']} --plot docs/images/decode-t5-xxl.png \\",
        "  -o benchmarks/records/decode-t5-xxl.json",
        "```",
        "",
        "![milliseconds a token against KV heads](images/decode-t5-xxl.png)",
        "",
        "Two layers of 24 carry the whole output embedding, whose weights do not depend on G: with all layers the curve is",
        "steeper. More than 100% of the floor is a product faster than PyTorch's.",
        "",
        *by_groups(record),
    ]


def engines_avx2(record: Record) -> list[str]:
    """The same on a processor that PyTorch's packed products were not made for."""
    return [
        *engines(record, "Beside other engines, without AVX-512"),
        "This processor has AVX2 alone. `prepare_for_inference` takes a kernel of our own there (`DirectLinear`): oneDNN's",
        "packed layers leave much of such a processor unused, and PyTorch emulates its products of bfloat16.",
        "",
    ]


def t5_avx2(record: Record) -> list[str]:
    return t5(record, "T5-Large's decoder, without AVX-512")


def operator_avx2(record: Record) -> list[str]:
    return operator(record, "The operator, without AVX-512", "attention-cpu-avx2")


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
        "One layer, milliseconds a call, weights read from memory: `linear` is `F.linear`, `mkl` and `to_mkldnn` are",
        "PyTorch's own packings, `packed` and `direct` are `PackedLinear` and `DirectLinear`; a dash: not on this processor.",
        f"`prepare_for_inference` takes {taken} here. {conditions(record)}.",
        "",
        "```sh",
        "python benchmarks/linear.py -o benchmarks/records/linear.json",
        "```",
        "",
        *table(("dtype", "rows", "layer", *names, "faster than linear"), rows),
    ]


SECTIONS = {
    "linear.json": linear,
    "attention-cpu.json": operator,
    "attention-cpu-avx2.json": operator_avx2,
    "decode-engines.json": engines,
    "decode-engines-avx2.json": engines_avx2,
    "decode-t5-large.json": t5,
    "decode-t5-large-avx2.json": t5_avx2,
    "decode-llama-1b.json": llama,
    "decode-t5-xxl.json": t5_xxl,
}


def page() -> str:
    """The whole page."""
    lines = [
        "# How fast decoding is",
        "",
        "Figures of two machines, one with AVX-512 and one without, by `regroup bench` and `benchmarks/`; this page is made",
        "from their records (`benchmarks/records/`) by `python benchmarks/report.py`. The floor of a step is the larger",
        "of the bytes that it reads over the bandwidth of reading, and of its FLOPs over the rate of a matrix product of",
        "that shape, both measured in turns with what is compared: memory is shared with other machines, and its speed",
        "changes within minutes. Ratios count, and not milliseconds of different runs. There was no GPU.",
        "",
    ]
    for name, section in SECTIONS.items():
        if (RECORDS / name).exists():
            lines += section(json.loads((RECORDS / name).read_text(encoding="utf-8")))
    return "\n".join(lines).rstrip() + "\n"


def main(check: Annotated[bool, typer.Option("--check")] = False) -> None:
    if not check:
        PAGE.write_text(page(), encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page():
        print("docs/benchmarks.md is not what the records say; run python benchmarks/report.py", file=sys.stderr)
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
