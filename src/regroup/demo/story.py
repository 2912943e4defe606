"""What `regroup demo` does: convert the embedded parent to several G with each method and show what each costs."""

from __future__ import annotations

import json
import shutil
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..console import count_progress, human_bytes, out
from ..convert.text import CalibrationText
from ..data import token_windows
from ..evaluate import Score, causal_batches, score
from ..evaluate.run import load_for_scoring
from ..inspection import summarize
from ..models import load_tokenizer
from ..pipeline import convert_checkpoint
from ..record import record, write_record
from .corpus import held_out_text, training_text

PARENT = Path(str(files("regroup.demo"))) / "parent"
# The paper's three rules, then ours from weights alone and on text.
METHODS = ("mean", "first", "random", "auto", "auto + text")
CALIBRATION_TOKENS = 32_768
KV_HEADS = (4, 2, 1)
WINDOW = 256


def tell(output: Path, *, windows: int) -> dict[str, Any]:
    """Run the demonstration.

    Args:
        output: folder for the converted checkpoints, ``demo.json`` and ``demo.png``; parts of an earlier run that lie
            there are replaced.
        windows: held-out windows of 256 tokens.

    Returns:
        The record that was written.
    """
    started = time.perf_counter()
    training = json.loads((PARENT / "training.json").read_text(encoding="utf-8"))
    tokenizer = load_tokenizer(PARENT)
    cut, nbytes = token_windows(
        (text for _, text in held_out_text()), tokenizer, length=WINDOW, limit=windows, bos=False
    )
    parent = load_for_scoring(PARENT, "float32", "cpu")
    out.print(
        f"The parent: a multi-head Llama of {sum(p.numel() for p in parent.parameters()) / 1e6:.1f} M parameters with "
        f"{parent.config.num_attention_heads} heads, trained on {training['tokens'] / 1e6:.1f} M tokens of "
        f"Python's standard library.\nHeld out: {len(cut)} windows of {WINDOW} tokens from files it never saw.\n"
    )
    text = _calibration_text(output)
    variants = [(method, heads) for heads in KV_HEADS for method in METHODS]
    rows: list[dict[str, Any]] = []
    with count_progress("converting and evaluating", len(variants) + 1) as progress:
        base = score(parent, causal_batches(cut, 16))
        progress(1)
        for method, heads in variants:
            folder = output / f"{method.replace(' + ', '-')}-{heads}"
            shutil.rmtree(folder, ignore_errors=True)
            convert_checkpoint(
                PARENT,
                folder,
                kv_heads=heads,
                method=method.removesuffix(" + text"),
                calibration=text if method.endswith("text") else None,
            )
            child = load_for_scoring(folder, "float32", "cpu")
            result = score(child, causal_batches(cut, 16), teacher=parent)
            rows.append(
                {
                    "method": method,
                    "num_key_value_heads": heads,
                    "kv_bytes_per_token": summarize(str(folder)).kv_bytes("F16"),
                    **_figures(result, nbytes),
                    "excess_nats_per_token": result.nats_per_token - base.nats_per_token,
                }
            )
            progress(1)
    heads = parent.config.num_key_value_heads
    before = {
        "method": "parent",
        "num_key_value_heads": heads,
        "kv_bytes_per_token": summarize(str(PARENT)).kv_bytes("F16"),
        **_figures(base, nbytes),
        "excess_nats_per_token": 0.0,
    }
    _table([before, *rows])
    value = record(
        "demo",
        {
            "windows": len(cut),
            "window": WINDOW,
            "dtype": "float32",
            "parent_tokens": training["tokens"],
            "calibration_tokens": CALIBRATION_TOKENS,
        },
        {"rows": [before, *rows], "seconds": time.perf_counter() - started},
    )
    write_record(output / "demo.json", value)
    plot(value, output / "demo.png")
    out.print(
        f"\nmean, first and random are the paper's merge rules. auto shares heads by linear maps that queries and"
        f"\noutputs absorb, from the weights alone or on {CALIBRATION_TOKENS:,} tokens of training text. Nothing was"
        f"\ntrained: the paper continues pre-training afterwards, for 5% of the original compute."
        f"\nWrote {output / 'demo.png'}, {output / 'demo.json'} and the checkpoints beside them "
        f"({time.perf_counter() - started:.0f} s). Load one with regroup.load or AutoModelForCausalLM."
    )
    return value


def _calibration_text(output: Path) -> CalibrationText:
    """Training files as JSON lines: text that the parent knows and the evaluation does not use."""
    path = output / "calibration.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps({"text": text}) for _, text in training_text())
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CalibrationText(path, tokens=CALIBRATION_TOKENS, window=WINDOW, batch=8)


def _figures(result: Score, nbytes: int) -> dict[str, float | int | None]:
    return {
        "tokens": result.tokens,
        "nats_per_token": result.nats_per_token,
        "standard_error": result.standard_error,
        "bits_per_byte": result.bits_per_byte(nbytes),
        "kl_nats_per_token": result.kl_nats_per_token,
        "top1_agreement": result.top1_agreement,
    }


def _table(rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    table = Table()
    for name in ("KV heads", "method", "KV/token", "nats/token", "excess", "KL", "top-1"):
        table.add_column(name, no_wrap=True)
    last = None
    for row in rows:
        if last not in (None, row["num_key_value_heads"]):
            table.add_section()
        last = row["num_key_value_heads"]
        table.add_row(
            str(row["num_key_value_heads"]),
            row["method"],
            human_bytes(row["kv_bytes_per_token"]),
            f"{row['nats_per_token']:.3f}",
            f"{row['excess_nats_per_token']:+.3f}" if row["method"] != "parent" else "–",
            "–" if row["kl_nats_per_token"] is None else f"{row['kl_nats_per_token']:.3f}",
            "–" if row["top1_agreement"] is None else f"{row['top1_agreement']:.1%}",
        )
    out.print(table)


def plot(value: dict[str, Any], path: Path) -> None:
    """Loss against KV heads, a line a method, from a demo record."""
    from matplotlib.figure import Figure

    rows = value["results"]["rows"]
    parent = rows[0]
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    methods = dict.fromkeys(row["method"] for row in rows[1:])
    for method, marker in zip(methods, "osD^vP*", strict=False):
        line = [parent] + [row for row in rows if row["method"] == method]
        heads = [row["num_key_value_heads"] for row in line]
        axes.plot(heads, [row["nats_per_token"] for row in line], marker=marker, label=method)
    axes.axhline(parent["nats_per_token"], color="0.4", linestyle=":", label="multi-head parent")
    axes.set_xscale("log", base=2)
    ticks = sorted({row["num_key_value_heads"] for row in rows})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("key/value heads (the cache shrinks to the left)")
    axes.set_ylabel("held-out nats a token")
    axes.set_title("Converted, not yet uptrained: what each merge rule costs", fontsize=11)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
