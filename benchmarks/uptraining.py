"""Tokens per second of uptraining, compared with transformers' plain Trainer with the same settings.

    python benchmarks/uptraining.py ORIGINAL CONVERTED DATA -o benchmarks/records/uptraining-throughput.json

Four ways, in turn, ``--rounds`` times: plain Trainer on the original model (with text that is tokenised before the time
starts), and ``regroup uptrain`` of the converted model with cross-entropy, with KL to the original model, and with KL
and hidden states. One additional round is a warm-up and does not count. Times are of whole runs, from the first batch
to the last step.

Utilisation is the model's FLOPs (forward and backward, the teacher's forward; recomputation does not count) per
second over the rate of a large matrix product of the same dtype, measured between rounds: what PyTorch reaches on this
device, not what its maker states.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments

from regroup.bench.machine import timed
from regroup.data import read_texts, token_windows
from regroup.modeling import load, load_tokenizer
from regroup.record import record, write_record
from regroup.uptraining.recipe import Recipe
from regroup.uptraining.run import uptrain

RATE = 1e-4


def plain(original: Path, windows: torch.Tensor, steps: int, batch: int, device: str | None, dtype: str) -> float:
    """Seconds of ``Trainer.train`` on prepared windows."""
    rows = [{"input_ids": row, "labels": row} for row in windows]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=RATE,
            lr_scheduler_type="cosine",
            warmup_steps=round(0.05 * steps),
            weight_decay=0.1,
            bf16=dtype == "bfloat16",
            use_cpu=device == "cpu" or not torch.cuda.is_available(),
            logging_steps=10,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            log_level="warning",
        )
        model: Any = load(original, dtype=torch.float32, progress=False)
        trainer = Trainer(model=model, args=arguments, train_dataset=rows)  # type: ignore[arg-type]
        return float(trainer.train().metrics["train_runtime"])


def ours(converted: Path, data: Path, steps: int, batch: int, window: int, **settings: Any) -> tuple[float, int]:
    """Seconds and FLOPs of the training of ``regroup uptrain``, with its reading and tokenising."""
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Recipe(
            model=str(converted),
            output=Path(scratch) / "run",
            data=(str(data),),
            steps=steps,
            window=window,
            batch_size=batch,
            learning_rate=RATE,
            optimizer="adamw",
            windows="packed",
            save_every=10**9,
            report_to=(),
            **settings,
        )
        done = uptrain(recipe)
        assert done.record is not None
        return float(done.record["results"]["seconds"]), int(done.record["results"]["flops"])


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs per second of a large matrix product, the best of some runs."""
    size = 2048 if device.type == "cpu" else 8192
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timed(lambda: left @ right, device)  # warm-up
    return 2 * size**3 / min(timed(lambda: left @ right, device) for _ in range(10))


def main(
    original: Path,
    converted: Path,
    data: Path,
    steps: Annotated[int, typer.Option()] = 30,
    batch: Annotated[int, typer.Option(help="Windows per step.")] = 8,
    window: Annotated[int, typer.Option()] = 256,
    rounds: Annotated[int, typer.Option()] = 5,
    device: Annotated[str | None, typer.Option()] = None,
    dtype: Annotated[str, typer.Option()] = "float32",
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    windows, _ = token_windows(read_texts(data), load_tokenizer(original), length=window, limit=steps * batch)
    assert len(windows) == steps * batch, "there is too little text"
    shared: dict[str, Any] = {"device": device, "dtype": dtype}
    with_teacher = {"teacher": str(original), **shared}
    ways: dict[str, Callable[[], tuple[float, int | None]]] = {
        "plain Trainer, the parent": lambda: (plain(original, windows, steps, batch, device, dtype), None),
        "cross-entropy": lambda: ours(converted, data, steps, batch, window, **shared),
        "KL": lambda: ours(converted, data, steps, batch, window, hidden_weight=0.0, **with_teacher),
        "KL and hidden states": lambda: ours(converted, data, steps, batch, window, **with_teacher),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    flops: dict[str, int | None] = {}
    rates: list[float] = []
    place = torch.device("cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda")
    for number in range(rounds + 1):
        rates.append(matrix_rate(place, getattr(torch, dtype)))
        for name, run in ways.items():
            took, flops[name] = run()
            if number:
                seconds[name].append(took)
            Console(stderr=True).print(f"round {number}: {name}: {took:.1f} s")
    tokens = steps * batch * window
    rows = [
        {
            "way": name,
            "tokens_per_second": tokens / median(took),
            "slowest": tokens / max(took),
            "fastest": tokens / min(took),
            "time_to_plain": median(a / b for a, b in zip(took, seconds["plain Trainer, the parent"], strict=True)),
            "time_to_cross_entropy": median(a / b for a, b in zip(took, seconds["cross-entropy"], strict=True)),
            "flops": flops[name],
            "utilisation": None if (work := flops[name]) is None else work / median(took) / median(rates),
        }
        for name, took in seconds.items()
    ]
    model: Any = load(original, progress=False)
    configuration = {
        "parent": original.name,
        "child": converted.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": data.name,
        "steps": steps,
        "batch": batch,
        "window": window,
        "rounds": rounds,
        "device": place.type,
        "dtype": dtype,
    }
    results = {"ways": rows, "seconds": seconds, "matrix_flops_per_second": rates}
    write_record(output, record("uptraining-throughput", configuration, results))
    table = Table("way", "tokens/s", "slowest – fastest", "time to plain", "time to cross-entropy", "utilisation")
    for row in rows:
        table.add_row(
            row["way"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['slowest']:,.0f} – {row['fastest']:,.0f}",
            f"{row['time_to_plain']:.2f}",
            f"{row['time_to_cross_entropy']:.2f}",
            "–" if row["utilisation"] is None else f"{row['utilisation']:.0%}",
        )
    Console(stderr=True).print(table)


if __name__ == "__main__":
    typer.run(main)
