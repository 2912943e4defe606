"""Whole models by the number of KV heads (``regroup bench decode``): the paper's Figure 6."""

# ruff: noqa: E501

from __future__ import annotations

from .form import Record, conditions, goal, ms, row, table


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
        (
            "KV heads",
            "floor",
            "regroup, ms",
            "of the floor",
            "over MHA",
            "allowed",
            "share",
            "transformers, ms",
            "cache, MB",
        ),
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
        "16 heads, 2048 encoded tokens, float32, random weights, milliseconds per step; the encoder is not run. `allowed`",
        "is the ratio of the floors, `share` the reached part of it.",
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
        "![milliseconds per token against KV heads](images/decode-groups.png)",
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
        "![milliseconds per token against KV heads](images/decode-t5-xxl.png)",
        "",
        "The two layers (of 24) include the whole output embedding, whose weights do not depend on G: with all layers the",
        "curve is steeper. More than 100% of the floor: products faster than PyTorch's.",
        "",
        *by_groups(record),
    ]


def t5_avx2(record: Record) -> list[str]:
    return t5(record, "T5-Large's decoder, without AVX-512")
