"""What is done to a model: pre-training, conversion, uptraining, fine-tuning, each kept on disk when it is complete.

All training is `regroup uptrain`: a parent's pre-training is the uptraining of random weights, fine-tuning is the
objective of pairs.
"""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np

import regroup
from regroup.data import causal_batches, pair_batches, read_pairs, read_texts, token_windows
from regroup.errors import RegroupError
from regroup.evaluation import score
from regroup.evaluation.run import load_for_scoring
from regroup.modeling import load_tokenizer
from regroup.plans import CalibrationText
from regroup.uptraining.objective import SpanCorruption, make_objective
from regroup.uptraining.recipe import Recipe
from regroup.uptraining.run import uptrain

from .parents import write_new
from .tasks import evaluate_choices, evaluate_pairs
from .texts import PAD
from .variants import OURS, UNTRAINED, Bench, Variant


def pretrain(bench: Bench, family: str, which: str) -> None:
    """Train an original model from random weights; of ``UNTRAINED``, write those alone."""
    scale, folder = bench.scale, bench.parent(family, which)
    if folder.exists():
        return
    new = bench.work / "new" / f"{family}-{which}"
    shutil.rmtree(new, ignore_errors=True)
    # Of what is timed, and of the passages whose continuation is asked for.
    positions = max(2 * scale.decode_prompt, 256)
    shape = scale.small if which == "small" else scale.large
    if which == UNTRAINED:
        # The weights that the large one's pre-training begins with.
        write_new(family, shape, bench.texts.tokenizer, new, positions=positions)
        folder.parent.mkdir(parents=True, exist_ok=True)
        new.rename(folder)
        return
    if which == "scratch":
        many = new.with_name(new.name + "-heads")
        shutil.rmtree(many, ignore_errors=True)
        write_new(family, shape, bench.texts.tokenizer, many, positions=positions)
        # The first of random heads is a random head: what a model with one KV head begins with.
        regroup.convert(many, new, kv_heads=1, method="first")
    else:
        write_new(family, shape, bench.texts.tokenizer, new, positions=positions)
    schedule: dict[str, Any] = {"learning_rate": scale.pretraining_rate}
    if family == "encoder-decoder":
        schedule = {"schedule": "inverse-sqrt", "original_steps": 1}
    _train(
        bench,
        new,
        folder.parent,
        data=(str(bench.texts.pretraining),),
        tokens=bench.pretraining_tokens(family),
        # The first steps of a run are not spikes, and a parent that diverges is a result of its own.
        **schedule,
    )


def pretraining_facts(bench: Bench, family: str, which: str) -> dict[str, Any]:
    """Results of the pre-training of an original model, for the record."""
    results = json.loads((bench.parent(family, which).parent / "record.json").read_text())["results"]
    kept = ("tokens", "steps", "flops", "seconds", "spikes", "largest_spike", "last_cross_entropy")
    return {name: results[name] for name in kept}


def convert(bench: Bench, variant: Variant) -> None:
    """Convert an original model."""
    folder = bench.checkpoint(Variant(variant.family, variant.parent, variant.heads, variant.method, 0.0, variant.seed))
    if variant.heads is None or folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    ours = variant.method == OURS
    regroup.convert(
        bench.parent(variant.family, variant.parent),
        folder,
        kv_heads=variant.heads,
        method="auto" if ours else variant.method,
        seed=variant.seed if variant.method == "random" else None,
        calibration=calibration(bench, variant.family) if ours else None,
        repair="distill" if ours else "output",
        device=bench.device if ours else None,
    )


def calibration(bench: Bench, family: str) -> CalibrationText:
    """Text to convert on, `calibration_tokens` of it; of an encoder-decoder, corrupted as in its pre-training."""
    scale = bench.scale
    rows = scale.calibration_tokens // scale.window
    if family == "decoder":
        return CalibrationText(bench.texts.calibration, scale.calibration_tokens, scale.window, min(16, rows // 2))
    path = spans(bench, bench.texts.calibration, rows)
    # A pair counts as 16 tokens there.
    return CalibrationText(path, 16 * rows, batch=min(16, rows // 2))


def spans(bench: Bench, text: Path, rows: int) -> Path:
    """Corrupted text as pairs, as an encoder-decoder sees it in pre-training; equal every time."""
    path = text.with_name(f"{text.stem}-spans.jsonl")
    if path.exists():
        return path
    tokenizer = load_tokenizer(bench.texts.tokenizer)
    objective = make_objective("span-corruption", tokenizer, window=bench.scale.window, start_token=PAD)
    assert isinstance(objective, SpanCorruption)
    ids = [token for document in read_texts(text) for token in tokenizer.encode(document)[:-1]]
    draw, size = random.Random(0), objective.raw_length
    lines = []
    for start in range(0, min(rows * size, len(ids) - size), size):
        pair = objective.corrupt({"ids": np.array(ids[start : start + size], np.int32)}, draw)
        source, target = (tokenizer.decode(pair[side][:-1]) for side in ("input", "target"))
        lines.append(json.dumps({"source": source, "target": target}, ensure_ascii=False) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def uptrain_variant(bench: Bench, variant: Variant) -> None:
    """Uptrain a converted model, as the paper does or by distilling the original."""
    folder = bench.checkpoint(variant)
    if variant.alpha == 0 or folder.exists():
        return
    scale = bench.scale
    tokens = round(variant.alpha * bench.pretraining_tokens(variant.family))
    parent = bench.parent(variant.family, variant.parent)
    settings: dict[str, Any] = {}
    if variant.family == "encoder-decoder":
        steps = bench.pretraining_tokens(variant.family) // (scale.batch * scale.window)
        settings = {"schedule": "inverse-sqrt", "original_steps": steps}
    else:
        settings = {"learning_rate": scale.pretraining_rate}
    if variant.method == OURS:
        settings = {
            "teacher": str(parent),
            "optimizer": "adamw",
            "windows": "packed",
            "schedule": "cosine",
            "learning_rate": scale.distillation_rate,
        }
        tokens -= scale.calibration_tokens
    _train(
        bench,
        bench.checkpoint(Variant(variant.family, variant.parent, variant.heads, variant.method, 0.0, variant.seed)),
        folder.parent,
        data=(str(bench.texts.uptraining),),
        tokens=tokens,
        seed=variant.seed,
        **settings,
    )


def fine_tune(bench: Bench, variant: Variant, task: str) -> dict[str, Any]:
    """Fine-tune on a task and evaluate on its development rows; a run that diverges says so."""
    scale = bench.scale
    kept = bench.work / "results" / f"{variant.name}-s{variant.seed}-{task}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder = bench.work / "tuned" / f"{variant.name}-s{variant.seed}-{task}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        record = _train(
            bench,
            bench.checkpoint(variant),
            folder,
            data=(str(bench.texts.tuning(task)),),
            steps=scale.tuning_steps,
            batch_size=scale.tuning_batch,
            learning_rate=scale.tuning_rate,
            schedule="cosine",
            optimizer="adamw",
            dropout=0.0,
            objective="pairs",
            seed=variant.seed,
        )
        found = evaluate_pairs(bench, folder / "model", task)
        history = [row["loss"] for row in record["results"]["history"] if "loss" in row]
        found |= {"spikes": record["results"]["spikes"], "losses": history, "diverged": False}
    except RegroupError as error:
        if "diverged" not in str(error) and "not a number" not in str(error):
            raise
        found = {"quality": 0.0, "diverged": True}
    shutil.rmtree(folder, ignore_errors=True)  # some hundred of them
    return _keep(kept, found)


def held_out(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Loss on books of other authors, nats a target token; of a decoder also the continuations that it tells apart."""
    kept = bench.work / "results" / f"{variant.name}-held-out.json"
    if kept.exists():
        return json.loads(kept.read_text())
    folder, rows = bench.checkpoint(variant), bench.scale.held_out
    tokenizer = load_tokenizer(folder)
    if variant.family == "decoder":
        windows, _ = token_windows(
            read_texts(bench.texts.held_out), tokenizer, length=bench.scale.window, limit=rows, bos=False
        )
        batches = causal_batches(windows, 32)
    else:
        pairs = list(read_pairs(spans(bench, bench.texts.held_out, rows)))
        batches = pair_batches(pairs, tokenizer, batch_size=32, start_token=PAD)
    result = score(load_for_scoring(folder, "float32", bench.device), batches)
    found = {"nats_per_token": result.nats_per_token, "standard_error": result.standard_error}
    if variant.family == "decoder":
        found |= evaluate_choices(bench, folder)
    return _keep(kept, found)


def _train(bench: Bench, model: Path, output: Path, **settings: Any) -> dict[str, Any]:
    scale = bench.scale
    recipe = Recipe(
        model=str(model),
        output=output,
        **({"window": scale.window, "batch_size": scale.batch, "dtype": scale.dtype, "seed": 0} | settings),
        epochs=10 if settings.get("objective") == "pairs" else 1,
        save_every=10**9,
        report_to=(),
        device=bench.device,
    )
    done = uptrain(recipe)
    assert done.record is not None
    if done.record["results"]["data_ended"]:
        raise RegroupError("the text ended before the run did", file=recipe.data[0], remedy="give more of it")
    for state in output.glob("checkpoint-*"):
        shutil.rmtree(state)
    return done.record


def _keep(path: Path, found: dict[str, Any]) -> dict[str, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(found))
    temporary.rename(path)
    return found
