"""What uptraining gains, by conversion method and objective: the table of docs/uptraining.md.

    python recipes/uptraining_curve.py PARENT TRAIN HELD_OUT --kv-heads 2,1 --tokens 65k,262k,1M -o record.json

Four ways: the paper's (mean-pooled, cross-entropy), each of its two halves replaced, and ours (low-rank sharing on text
with repair, distillation). Every budget is a run of its own with its own schedule, over text that is seen once. The
last documents of TRAIN are for calibration alone, the first ones of HELD_OUT for evaluation, the next ones for choosing
each way's learning rate. Results are kept as they come (``--work``), so a run that was broken off resumes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from regroup.conversion.convert import convert
from regroup.data import read_texts, token_windows
from regroup.errors import human_kv_heads
from regroup.evaluation import causal_batches, score
from regroup.evaluation.run import load_for_scoring
from regroup.modeling import load_tokenizer
from regroup.plans import CalibrationText
from regroup.record import record, write_record
from regroup.uptraining.budget import parse_count
from regroup.uptraining.recipe import Recipe
from regroup.uptraining.run import uptrain

CALIBRATION_TOKENS = 32_768


@dataclass(frozen=True)
class Way:
    """How a converted model is made and what it learns from."""

    name: str
    method: str
    text: bool
    distilled: bool


WAYS = (
    Way("mean, cross-entropy (the paper's)", "mean", False, False),
    Way("mean, distillation", "mean", False, True),
    Way("low-rank, cross-entropy", "lowrank", False, False),
    Way("low-rank on text with repair, distillation (ours)", "auto", True, True),
)


@dataclass(frozen=True)
class Bench:
    """What all runs share."""

    original: Path
    folder: Path
    train: Path
    calibration: Path
    windows: torch.Tensor
    tuning: torch.Tensor
    window: int
    batch: int
    starts: bool

    def converted(self, way: Way, heads: int) -> Path:
        path = self.folder / f"{way.method}-{'text' if way.text else 'weights'}-{heads}"
        if not path.exists():
            text = CalibrationText(self.calibration, CALIBRATION_TOKENS, self.window, document_starts=self.starts)
            convert(
                self.original,
                path,
                kv_heads=heads,
                method=way.method,
                calibration=text if way.text else "none",
            )
        return path

    def run(self, way: Way, heads: int, tokens: int, rate: float, seed: int) -> dict[str, Any]:
        """Uptrain once; losses on both held-out texts and what it took."""
        spent = {"flops": 0, "tokens": 0}
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            model = self.converted(way, heads)
            if tokens:
                recipe = Recipe(
                    model=str(model),
                    output=Path(scratch) / "run",
                    data=(str(self.train),),
                    tokens=tokens,
                    teacher=str(self.original) if way.distilled else None,
                    window=self.window,
                    batch_size=self.batch,
                    learning_rate=rate,
                    optimizer="adamw",
                    windows="packed",
                    seed=seed,
                    save_every=10**9,
                    report_to=(),
                    device="cpu",
                )
                done = uptrain(recipe)
                assert done.record is not None
                assert done.model is not None
                assert not done.record["results"]["data_ended"], "text would have been seen twice"
                spent = {name: done.record["results"][name] for name in spent}
                model = done.model
            converted = load_for_scoring(model, "float32", "cpu")
            return {
                "nats_per_token": score(converted, causal_batches(self.windows, 16)).nats_per_token,
                "tuning_nats_per_token": score(converted, causal_batches(self.tuning, 16)).nats_per_token,
                **spent,
            }


def main(
    original: Path,
    train: Path,
    held_out: Path,
    kv_heads: Annotated[str, typer.Option("--kv-heads")] = "2,1",
    tokens: Annotated[str, typer.Option(help="Budgets; 1M:1 has one seed, whatever --seeds says.")] = "65k,262k,1M",
    choose_at: Annotated[str | None, typer.Option(help="Tokens at which rates are chosen; the middle budget.")] = None,
    rates: Annotated[str, typer.Option(help="Learning rates to choose from.")] = "0.001,0.003",
    seeds: Annotated[int, typer.Option(help="Of the paper's way and ours.")] = 3,
    between_seeds: Annotated[int, typer.Option(help="Of the ways between them.")] = 3,
    window: Annotated[int, typer.Option()] = 256,
    windows: Annotated[int, typer.Option()] = 64,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 4,
    bos: Annotated[bool, typer.Option(help="Held-out windows begin with the tokenizer's mark of a beginning.")] = True,
    document_starts: Annotated[bool, typer.Option(help="Windows begin where documents do; otherwise anywhere.")] = True,
    work: Annotated[Path, typer.Option(help="Where results are kept as they come.")] = Path("uptraining-work"),
    go_on: Annotated[Path | None, typer.Option(help="A record whose runs and learning rates are kept.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
    figure: Annotated[Path | None, typer.Option(help="Where to draw the curves.")] = None,
) -> None:
    work.mkdir(parents=True, exist_ok=True)
    bench, base = prepare(original, train, held_out, window, windows, batch, work, starts=document_starts, bos=bos)
    kept = work / "rows.jsonl"
    earlier = earlier_runs(go_on, base) if go_on else {"runs": [], "chosen": {}}
    rows: list[dict[str, Any]] = list(earlier["runs"])
    rows += [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []

    def have(way: Way, heads: int, count: int, rate: float, seed: int) -> dict[str, Any]:
        key = {"way": way.name, "num_key_value_heads": heads, "asked": count, "rate": rate, "seed": seed}
        for row in rows:
            if all(row[name] == value for name, value in key.items()):
                return row
        row = key | bench.run(way, heads, count, rate, seed)
        rows.append(row)
        with kept.open("a") as file:
            file.write(json.dumps(row) + "\n")
        Console(stderr=True).print(f"{key} {row['nats_per_token'] - base:+.3f}")
        return row

    asked = [part.partition(":") for part in tokens.split(",")]
    budgets = {parse_count(count): int(most or seeds) for count, _, most in asked}
    middle = parse_count(choose_at) if choose_at else sorted(budgets)[len(budgets) // 2]
    groups, choices = [int(part) for part in kv_heads.split(",")], [float(part) for part in rates.split(",")]
    # Once for each way, on text of its own.
    chosen = earlier["chosen"] or {
        (way.name, heads): best_rate(
            choices,
            lambda rate, way=way, heads=heads: have(way, heads, middle, rate, 0)["tuning_nats_per_token"],
        )
        for way in WAYS
        for heads in groups
    }
    used = [
        have(way, heads, count, chosen[way.name, heads] if count else 0.0, seed)
        for seed in range(seeds)
        for count, most in {0: 1, **budgets}.items()
        for heads in groups
        for way in WAYS
        if seed < (most if way in (WAYS[0], WAYS[-1]) else min(most, between_seeds))
    ]
    table = summarise(used, base)
    configuration = {
        "parent": original.name,
        "train": train.name,
        "held_out": held_out.name,
        "window": window,
        "windows": len(bench.windows),
        "batch": batch,
        "calibration_tokens": CALIBRATION_TOKENS,
        "seeds": [seeds, between_seeds],
        "document_starts": document_starts,
        "bos": bos,
        "rates": choices,
        "rates_chosen_at_tokens": middle,
        "chosen_rates": [{"way": way, "num_key_value_heads": g, "rate": rate} for (way, g), rate in chosen.items()],
    }
    results = {"parent_nats_per_token": base, "table": table, "runs": used}
    write_record(output, record("uptraining-curve", configuration, results))
    show(table)
    if figure is not None:
        draw(table, figure)


def earlier_runs(path: Path, base: float) -> dict[str, Any]:
    """Runs and chosen rates of a record on the same texts: compared by the loss of the original model."""
    earlier = json.loads(path.read_text())
    found = earlier["results"]["parent_nats_per_token"]
    if abs(found - base) > 1e-5:
        raise SystemExit(
            f"{path}: the original model has {found:.6f} nats per token there and {base:.6f} here: other texts"
        )
    chosen = earlier["configuration"]["chosen_rates"]
    return {
        "runs": earlier["results"]["runs"],
        "chosen": {(row["way"], row["num_key_value_heads"]): row["rate"] for row in chosen},
    }


def best_rate(choices: list[float], loss: Callable[[float], float]) -> float:
    """The rate with the least loss; beyond the first and the last one others follow until it lies between two."""
    rates = sorted(choices)
    while (best := min(rates, key=loss)) in (rates[0], rates[-1]):
        rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]
    return best


def prepare(
    original: Path,
    train: Path,
    held_out: Path,
    window: int,
    windows: int,
    batch: int,
    work: Path,
    *,
    starts: bool,
    bos: bool,
) -> tuple[Bench, float]:
    """Divide the texts, and measure the original model."""
    tokenizer = load_tokenizer(original)
    documents = list(read_texts(train))
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in documents]
    last, reserved = len(documents), 0
    while reserved < 1.2 * CALIBRATION_TOKENS:
        last -= 1
        reserved += lengths[last] // window * window
    _write(work / "train.jsonl", documents[:last])
    _write(work / "calibration.jsonl", documents[last:])
    if starts:
        held = [text for text in read_texts(held_out) if len(tokenizer(text)["input_ids"]) >= window]
        first, _ = token_windows(held[:windows], tokenizer, length=window, document_starts=True, bos=bos)
        tuning, _ = token_windows(held[windows : 2 * windows], tokenizer, length=window, document_starts=True, bos=bos)
    else:
        held, _ = token_windows(read_texts(held_out), tokenizer, length=window, limit=2 * windows, bos=bos)
        first, tuning = held[0::2], held[1::2]
    base = score(load_for_scoring(original, "float32", "cpu"), causal_batches(first, 16)).nats_per_token
    files = work / "train.jsonl", work / "calibration.jsonl"
    return Bench(original, work, *files, first, tuning, window, batch, starts), base


def _write(path: Path, documents: Iterable[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")


def summarise(rows: list[dict[str, Any]], base: float) -> list[dict[str, Any]]:
    """Mean and spread over seeds."""
    table = []
    keys = dict.fromkeys((row["way"], row["num_key_value_heads"], row["asked"]) for row in rows)
    for way, heads, asked in keys:
        found = [row for row in rows if (row["way"], row["num_key_value_heads"], row["asked"]) == (way, heads, asked)]
        excess = [row["nats_per_token"] - base for row in found]
        table.append(
            {
                "way": way,
                "num_key_value_heads": heads,
                "tokens": found[0]["tokens"],
                "flops": found[0]["flops"],
                "excess_nats_per_token": mean(excess),
                "standard_deviation": stdev(excess) if len(excess) > 1 else None,
                "seeds": len(excess),
            }
        )
    return table


def show(table: list[dict[str, Any]]) -> None:
    for heads in dict.fromkeys(row["num_key_value_heads"] for row in table):
        counts = sorted({row["tokens"] for row in table})
        shown = Table(f"excess nats per token, {human_kv_heads(heads)}", *(f"{count:,} tokens" for count in counts))
        for way in dict.fromkeys(row["way"] for row in table):
            cells = {r["tokens"]: r for r in table if r["way"] == way and r["num_key_value_heads"] == heads}
            shown.add_row(way, *(f"{cells[c]['excess_nats_per_token']:+.3f}" if c in cells else "–" for c in counts))
        Console(stderr=True).print(shown)


def draw(table: list[dict[str, Any]], path: Path) -> None:
    """Excess loss against tokens, a panel for each G."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    groups = list(dict.fromkeys(row["num_key_value_heads"] for row in table))
    plot, axes = plt.subplots(1, len(groups), figsize=(5.5 * len(groups), 4.2), sharey=True, squeeze=False)
    for axis, heads in zip(axes[0], groups, strict=True):
        for way in dict.fromkeys(row["way"] for row in table):
            rows = [r for r in table if r["way"] == way and r["num_key_value_heads"] == heads]
            rows.sort(key=lambda row: row["tokens"])
            axis.errorbar(
                [row["tokens"] / 1000 for row in rows],
                [row["excess_nats_per_token"] for row in rows],
                yerr=[row["standard_deviation"] or 0 for row in rows],
                marker="o",
                capsize=3,
                label=way,
            )
        axis.set_title(f"{heads} KV head{'s' if heads > 1 else ''}")
        axis.set_xscale("symlog", linthresh=50)
        axis.set_yscale("log")
        axis.set_xlabel("uptraining tokens, thousands")
        axis.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("loss over the original model, nats per token")
    axes[0][-1].legend(fontsize=8)
    plot.tight_layout()
    plot.savefig(path, dpi=150)


if __name__ == "__main__":
    typer.run(main)
