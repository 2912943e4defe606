"""Rebuild the experiments of Ainslie et al. 2023 from nothing but text.

    python -m recipes.paper --data ../shared/data --work paper-work -o benchmarks/records/paper.json
    python -m recipes.paper --data ../shared/data --scale gpu --work paper-gpu -o benchmarks/records/paper-gpu.json

DATA holds books and a dictionary (`texts.py` says in which form). The first line takes some two hours on two cores.
Everything is kept in ``--work`` as it comes: the same command resumes an interrupted run.

Small and large parents are pre-trained, converted, uptrained and, if they are encoder-decoders, fine-tuned on two
tasks, in as many processes as there are cores; then decoding is timed with nothing else running. `settings.py` has
every number, `experiments.py` says which models each table and figure needs, `figures.py` draws them.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markdown import Markdown

from regroup.record import record, write_record

from . import experiments, stages
from .figures import draw
from .pool import Pool
from .settings import SCALES, TASKS
from .tables import table_1
from .texts import prepare
from .timing import time_models
from .variants import FAMILIES, PARENTS, UNTRAINED, Bench, Variant

console = Console(stderr=True)


def main(
    data: Annotated[Path, typer.Option(help="Folder of books and dictionary.")],
    scale: Annotated[str, typer.Option(help="cpu, gpu, or smoke: minutes, to see that all runs.")] = "cpu",
    work: Annotated[Path, typer.Option(help="Where everything is kept.")] = Path("paper-work"),
    processes: Annotated[int | None, typer.Option(help="At once. [default: one a core; one on a GPU]")] = None,
    figures: Annotated[Path | None, typer.Option(help="Folder for the figures.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The record.")] = None,
) -> None:
    chosen = SCALES[scale]
    device = "cuda" if scale == "gpu" else "cpu"
    started = time.monotonic()
    most = max(chosen.encoder_decoder_tokens, chosen.decoder_tokens)
    texts = prepare(
        data,
        work,
        # Span corruption takes more text than its input has tokens: what is missing does not count.
        pretraining=round(1.3 * most),
        uptraining=round(1.3 * max(chosen.alphas) * most) + 40_000,
        calibration=2 * chosen.calibration_tokens + 20_000,
        held_out=chosen.held_out,
    )
    bench = Bench(chosen, texts, work, device)
    pool = Pool(processes or (1 if device == "cuda" else torch.get_num_threads()), console.print)
    wanted = {family: experiments.variants(family, chosen) for family in FAMILIES}
    everything = [variant for found in wanted.values() for variant in found]
    parents = [(bench, family, which) for which in PARENTS for family in FAMILIES]
    parents.append((bench, "encoder-decoder", UNTRAINED))
    pool.run("pre-training", stages.pretrain, parents)
    trained = experiments.trained(everything)
    pool.run("conversion", stages.convert, [(bench, v) for v in {v.converted: v for v in trained}.values()])
    pool.run("uptraining", stages.uptrain_variant, [(bench, variant) for variant in trained])
    pool.run("held-out loss", stages.held_out, [(bench, variant) for variant in trained])
    tuned = [(bench, variant, task) for task in TASKS for variant in experiments.tuned(chosen)]
    pool.run("fine-tuning", stages.fine_tune, tuned)

    def answers(variant: Variant) -> dict[str, Any]:
        found = {task: stages.fine_tune(bench, variant, task) for task in TASKS}
        values = {task: result["quality"] for task, result in found.items()}
        return {
            "average": sum(values.values()) / len(values),
            **values,
            "spikes": sum(result.get("spikes", 0) for result in found.values()),
            "diverged": sum(int(result["diverged"]) for result in found.values()),
        }

    seconds = {family: time_models(bench, experiments.table(family, chosen, 0), console.print) for family in wanted}
    results = experiments.summarise(chosen, lambda variant: stages.held_out(bench, variant), answers, seconds)
    for family in FAMILIES:
        results[family]["pretraining"] = {which: stages.pretraining_facts(bench, family, which) for which in PARENTS}
    # Of this go alone: what lay in the work folder took its time before.
    results["minutes"] = (time.monotonic() - started) / 60
    found = record("paper", {"scale": scale, **experiments.plain(chosen)}, results)
    write_record(output, found)
    if figures is not None:
        draw(found, figures)
    console.print(Markdown("\n".join(table_1(found))), "mean ± standard deviation over seeds")
    console.print(f"done in {results['minutes']:.0f} minutes" + (f"; wrote {output}" if output else ""))


if __name__ == "__main__":
    typer.run(main)
