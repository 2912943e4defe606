"""Predictions of `regroup advise`, compared with measurements.

    python benchmarks/advise.py loss MODEL TEXT HELD_OUT -o benchmarks/records/advise-loss.json
    python benchmarks/advise.py speed CONFIG -o benchmarks/records/advise-speed.json

``loss`` converts a model by every plan of the advice, uniform and by layer, with the same text, and evaluates each on
held-out text; with ``--add``, the plans of a further model are added to the record. ``speed`` predicts a
model's decoding at several settings from bench records of two others, and then measures them.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from regroup.advice.candidates import plans_of
from regroup.advice.run import advise
from regroup.bench.decode import benchmark
from regroup.bench.work import Roofs, Work, models_for
from regroup.conversion.convert import convert
from regroup.evaluation.run import evaluate
from regroup.plans import CalibrationText
from regroup.record import record, write_record

app = typer.Typer()
console = Console(stderr=True)
Output = Annotated[Path, typer.Option("--output", "-o")]


@app.command()
def loss(
    model: Path,
    text: Path,
    held_out: Path,
    tokens: Annotated[int, typer.Option(help="Tokens of calibration.")] = 32_768,
    window: Annotated[int, typer.Option()] = 256,
    windows: Annotated[int, typer.Option(help="Held-out windows.")] = 64,
    document_starts: Annotated[bool, typer.Option()] = False,
    add: Annotated[bool, typer.Option(help="Add to the plans of the record.")] = False,
    output: Output = Path("advise-loss.json"),
) -> None:
    calibration = CalibrationText(text, tokens, window, 4, document_starts=document_starts)
    plans: list[dict[str, Any]] = []
    if add:
        plans = [plan for plan in json.loads(output.read_text())["results"]["plans"] if plan["parent"] != model.name]
    for name, chosen in plans_of(str(model), calibration).items():
        with tempfile.TemporaryDirectory() as scratch:
            converted = Path(scratch) / "converted"
            convert(model, converted, plan=chosen, calibration=calibration)
            found = evaluate(
                str(converted),
                held_out,
                teacher=str(model),
                window=window,
                windows=windows,
                document_starts=document_starts,
                batch_size=16,
                dtype="float32",
            )["results"]
        plans.append(
            {
                "parent": model.name,
                "plan": name,
                "predicted_kl": chosen.predicted_kl,
                "kl_nats_per_token": found["kl_nats_per_token"],
                "excess_nats_per_token": found["excess_nats_per_token"],
                "standard_error": found["standard_error"],
            }
        )
        console.print(f"{name}: predicted {chosen.predicted_kl:.3f}, measured {found['excess_nats_per_token']:.3f}")
    names = dict.fromkeys(plan["parent"] for plan in plans)
    ranking = {
        name: kendall([(p["predicted_kl"], p["excess_nats_per_token"]) for p in plans if p["parent"] == name])
        for name in names
    }
    configuration = {
        "calibration_tokens": tokens,
        "window": window,
        "windows": windows,
        "document_starts": document_starts,
        "last_parent": model.name,
    }
    write_record(output, record("advise-loss", configuration, {"plans": plans, "kendall_tau": ranking}))
    console.print(ranking)


def kendall(pairs: list[tuple[float, float]]) -> float:
    """Kendall's tau: the share of pairs of plans in the right order minus the share in the wrong order."""
    signs = [
        (a[0] - b[0] > 0) - (a[0] - b[0] < 0) == (a[1] - b[1] > 0) - (a[1] - b[1] < 0)
        for a, b in itertools.combinations(pairs, 2)
    ]
    return (2 * sum(signs) - len(signs)) / len(signs)


@app.command()
def speed(
    config: Path,
    layers: Annotated[int | None, typer.Option(help="Layers of the decoder.")] = None,
    dtype: Annotated[str, typer.Option()] = "float32",
    learn: Annotated[str, typer.Option(help="batch,prompt of the records for the predictions.")] = "1,512;16,256",
    settings: Annotated[str, typer.Option(help="batch,prompt of the predictions.")] = "2,1024;4,512;8,256;8,512",
    kv_heads: Annotated[str, typer.Option("--kv-heads")] = "32,8,4,1",
    new: Annotated[int, typer.Option()] = 16,
    output: Output = Path("advise-speed.json"),
) -> None:
    heads = [int(part) for part in kv_heads.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "config.json"
        model.write_text(json.dumps(smaller(config, layers)))

        def measured(batch: int, prompt: int) -> dict[str, Any]:
            work = Work(batch, prompt, new, dtype, "cpu", 3)
            return benchmark(config.name, models_for(str(model), heads, work), work, roofs=Roofs(work))

        known: list[Path] = []
        for part in learn.split(";"):
            batch, prompt = (int(number) for number in part.split(","))
            known.append(Path(scratch) / f"bench-{len(known)}.json")
            write_record(known[-1], measured(batch, prompt))
        rows = []
        for part in settings.split(";"):
            batch, prompt = (int(number) for number in part.split(","))
            advice = advise(
                str(model),
                hardware="this",
                context=prompt + new // 2,
                batch=batch,
                dtype=dtype,
                bench=known,
                memory_bytes=10**12,
            )
            predicted = {one.kv_heads: one for one in advice.predictions}
            for found in measured(batch, prompt)["results"]["models"]:
                one = predicted[found["kv_heads"]]
                took = found["regroup"]["token_ms"]["p50"]
                rows.append(
                    {
                        "batch": batch,
                        "prompt": prompt,
                        "kv_heads": found["kv_heads"],
                        "predicted_ms": 1e3 * one.token_seconds,
                        "measured_ms": took,
                        "ratio": 1e3 * one.token_seconds / took,
                    }
                )
                console.print(
                    f"{part} G={found['kv_heads']}: {rows[-1]['predicted_ms']:.1f} predicted, {took:.1f} measured"
                )
    worst = max(max(row["ratio"], 1 / row["ratio"]) for row in rows)
    configuration = {"model": config.name, "layers": layers, "dtype": dtype, "learned_from": learn, "new": new}
    write_record(output, record("advise-speed", configuration, {"rows": rows, "worst_ratio": worst}))


def smaller(config: Path, layers: int | None) -> dict[str, Any]:
    from regroup.bench.variants import variant

    return variant(json.loads(config.read_text()), layers=layers)


if __name__ == "__main__":
    app()
