"""What grouping costs an encoder-decoder before any training, in phonemes that come out wrong.

    python recipes/g2p_conversion.py g2p-parent ../shared/data/g2p-train.tsv ../shared/data/g2p-test.tsv \\
        -o benchmarks/records/conversion-g2p.json

The original model, made by `g2p_parent.py`, has 8 heads in the decoder's self-attention and cross-attention; both are
converted to each G in each way. Its encoder keeps its heads: it has no KV cache. Every converted model then pronounces
the test words by greedy decoding. Calibration takes words from the training file alone, and nothing is tuned on the
test file.
`g2p_parent.py` says what the phoneme error rate is.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from g2p_parent import Pairs, errors, evaluate, pronounce
from rich.console import Console
from rich.table import Table

from regroup.conversion.convert import convert
from regroup.data import read_pairs
from regroup.errors import human_kv_heads
from regroup.modeling import load, load_tokenizer
from regroup.opening import open_layout
from regroup.plans import CalibrationText, make_plan
from regroup.record import record, write_record

# name, keys and values by (None: auto), with text, repair
VARIANTS: tuple[tuple[str, str | None, bool, str], ...] = (
    ("mean (the paper's)", "mean", False, "none"),
    ("first", "first", False, "none"),
    ("weights: procrustes", "procrustes", False, "none"),
    ("weights: lowrank", "lowrank", False, "none"),
    ("weights: keys lowrank, values procrustes", "lowrank/procrustes", False, "none"),
    ("weights: keys procrustes, values lowrank", "procrustes/lowrank", False, "none"),
    ("weights: auto", None, False, "none"),
    ("text: procrustes", "procrustes", True, "none"),
    ("text: lowrank", "lowrank", True, "none"),
    ("text: lowrank, output", "lowrank", True, "output"),
    ("text: auto, output", None, True, "output"),
    ("text: auto, distill", None, True, "distill"),
)
PAIR_TOKENS = 16  # CalibrationText counts a pair as so many tokens
RESAMPLES = 1000


def intervals(wrong: Sequence[int], baseline: Sequence[int], symbols: Sequence[int]) -> dict[str, list[float]]:
    """95% bootstrap intervals over words: of the error rate, and of what it lies above the baseline's on equal words.

    Args:
        wrong, baseline: wrong symbols of each word, of a converted model and of the original.
        symbols: of each word's reference.
    """
    rows = torch.tensor([wrong, baseline, symbols], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(rows.shape[1], (RESAMPLES, rows.shape[1]), generator=generator)
    converted, original, total = (row[drawn].sum(1) for row in rows)
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {
        "phoneme_error_rate_95": torch.quantile(converted / total, ends).tolist(),
        "excess_95": torch.quantile((converted - original) / total, ends).tolist(),
    }


def write_sample(pairs: Pairs, count: int, seed: int, path: Path) -> None:
    """A random sample as a file: calibration reads the top of a file, and the dictionary is in alphabetical order."""
    sample = random.Random(seed).sample(list(pairs), min(count, len(pairs)))
    path.write_text("".join(f"{word}\t{pronunciation}\n" for word, pronunciation in sample), encoding="utf-8")


def main(
    original: Path,
    training: Path,
    test: Path,
    kv_heads: Annotated[str, typer.Option("--kv-heads")] = "4,2,1",
    words: Annotated[int, typer.Option(help="Calibration pairs.")] = 4096,
    batch: Annotated[int, typer.Option(help="Calibration pairs per batch: a step of distillation.")] = 16,
    seed: Annotated[int, typer.Option(help="Of the sample of calibration pairs.")] = 0,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    torch.set_num_threads(threads)
    pairs, held = list(read_pairs(training)), list(read_pairs(test))
    test_words, references = [word for word, _ in held], [pronunciation for _, pronunciation in held]
    layout, tokenizer = open_layout(str(original)), load_tokenizer(original)
    rows: list[dict[str, Any]] = []
    baseline: list[int] = []

    def measure(name: str, heads: int, folder: Path, count: int, seconds: float) -> None:
        model: Any = load(folder, dtype=torch.float32, progress=False).eval()
        started = time.perf_counter()
        said = pronounce(model, tokenizer, test_words)
        decoding = time.perf_counter() - started
        wrong, symbols = errors(said, references)
        baseline.extend(wrong if not baseline else [])
        result = evaluate(model, tokenizer, held, said)
        result |= {"excess": result["phoneme_error_rate"] - sum(baseline) / sum(symbols)}
        rows.append(
            {
                "method": name,
                "num_key_value_heads": heads,
                **result,
                **intervals(wrong, baseline, symbols),
                "calibration_pairs": count,
                "conversion_seconds": seconds,
                "decoding_seconds": decoding,
            }
        )
        Console(stderr=True).print(f"G={heads} {name}: {_cell(rows[-1])} ({seconds:.0f} s)")

    with tempfile.TemporaryDirectory() as scratch:
        sample = Path(scratch) / "calibration.tsv"
        write_sample(pairs, words, seed, sample)
        measure("parent", layout.layers[0].num_key_value_heads, original, 0, 0.0)
        for heads in map(int, kv_heads.split(",")):
            for name, method, with_text, repair in VARIANTS:
                text = CalibrationText(sample, words * PAIR_TOKENS, batch=batch) if with_text else None
                with tempfile.TemporaryDirectory(dir=scratch) as place:
                    converted = Path(place) / "child"
                    started = time.perf_counter()
                    if method is None:
                        convert(
                            original, converted, kv_heads=heads, calibration=text or "none", repair=repair, device="cpu"
                        )
                    else:
                        plan = make_plan(layout, heads)
                        keys, values = method.split("/") if "/" in method else (method, method)
                        layers = tuple(replace(x, key_method=keys, value_method=values) for x in plan.layers)
                        plan = replace(plan, layers=layers)
                        convert(original, converted, plan=plan, calibration=text, repair=repair, device="cpu")
                    seconds = time.perf_counter() - started
                    measure(name, heads, converted, words if with_text else 0, seconds)

    configuration = {
        "parent": original.name,
        "parent_sha256": hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest(),
        "parent_training": training_of(original),
        "training": training.name,
        "test": test.name,
        "calibration_batch": batch,
        "seed": seed,
        "bootstrap_resamples": RESAMPLES,
    }
    value = record("conversion-g2p", configuration, {"rows": rows})
    write_record(output, value)
    show(value)


def training_of(original: Path) -> dict[str, Any] | None:
    """The record of the original model's training, if there is one, without its loss curve."""
    file = original / "training.json"
    if not file.is_file():
        return None
    return {name: value for name, value in json.loads(file.read_text()).items() if name != "loss_curve"}


def show(value: dict[str, Any]) -> None:
    base, *rows = value["results"]["rows"]
    groups = list(dict.fromkeys(row["num_key_value_heads"] for row in rows))
    table = Table("phoneme error rate (95% interval), nats per token", *(human_kv_heads(heads) for heads in groups))
    table.add_row(f"original, {human_kv_heads(base['num_key_value_heads'])}", *(_cell(base) for _ in groups))
    for name in dict.fromkeys(row["method"] for row in rows):
        table.add_row(name, *(_cell(row) for row in rows if row["method"] == name))
    Console(stderr=True).print(table)


def _cell(row: dict[str, Any]) -> str:
    low, high = row["phoneme_error_rate_95"]
    return f"{row['phoneme_error_rate']:.1%} ({low:.1%}–{high:.1%}), {row['nats_per_token']:.3f}"


if __name__ == "__main__":
    typer.run(main)
