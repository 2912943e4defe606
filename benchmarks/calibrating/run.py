"""One measurement: a parent, its conversion, and the clock beside it, each in a process of its own."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .clock import Clock, instrument, memory
from .parts import ALGEBRA, FORWARD, REST, Point, Shape, shares


def make_parent(folder: Path, shape: Shape, layers: int) -> None:
    """A Llama with random weights, in bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=shape.window,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def measure(parent: Path, scratch: Path, shape: Shape, windows: int, device: str, result: Path) -> None:
    """Calibrate and convert once, and leave what was measured in a JSON file. Runs in a process of its own."""
    import torch

    from regroup.conversion.convert import carry_out
    from regroup.opening import open_source
    from regroup.plans import CalibrationText, make_plan
    from regroup.writer.preview import prepare

    clock = Clock()
    instrument(clock)
    generator = torch.Generator().manual_seed(1)
    batches = [
        {"input_ids": torch.randint(shape.vocabulary, (1, shape.window), generator=generator)} for _ in range(windows)
    ]
    before, done = memory("RssAnon"), threading.Event()
    watcher = threading.Thread(target=clock.watch_memory, args=(done,), daemon=True)
    watcher.start()
    start = time.perf_counter()
    with open_source(str(parent)) as opened:
        text = CalibrationText("random tokens", tokens=windows * shape.window, window=shape.window, batch=1)
        plan = make_plan(opened.layout, shape.kv_heads, method="auto", grouping="search", calibration=text)
        ready = prepare(opened.checkpoint, opened.layout, plan)
        done_with = carry_out(opened, ready, scratch / "converted", batches, device=device)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    orders = sum(layer.query_order is not None for layer in done_with.result.plan.layers)
    result.write_text(
        json.dumps(
            {
                "seconds": seconds,
                # Beside the seconds it shows whether the machine had something else to do.
                "cpu_seconds": time.process_time(),
                "parts": dict(clock.seconds),
                "calls": dict(clock.calls),
                "peak_resident_bytes": memory("VmHWM"),
                "peak_anonymous_bytes": max(clock.peaks.values(), default=0),
                "anonymous_bytes_before": before,
                "peak_anonymous_bytes_by_part": clock.peaks,
                "layers_with_searched_heads": orders,
            }
        )
    )


def apart(target: Callable[..., None], *args: Any) -> None:
    """Run in a fresh process, whose memory is its own."""
    process = multiprocessing.get_context("spawn").Process(target=target, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{target.__name__} failed with status {process.exitcode}")


def measured(point: Point, shape: Shape, repeats: int, device: str, scratch: Path | None) -> dict[str, Any]:
    """A point measured a number of times: medians of the seconds, the highest of the memory."""
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        parent, result = Path(name) / "parent", Path(name) / "result.json"
        apart(make_parent, parent, shape, point.layers)
        for _ in range(repeats):
            with tempfile.TemporaryDirectory(dir=name) as room:
                apart(measure, parent, Path(room), shape, point.windows, device, result)
            runs.append(json.loads(result.read_text()))
    parts = {part: statistics.median(run["parts"].get(part, 0.0) for run in runs) for part in FORWARD + ALGEBRA + REST}
    peaks = {part for run in runs for part in run["peak_anonymous_bytes_by_part"]}
    return {
        **asdict(point),
        "seconds": statistics.median(run["seconds"] for run in runs),
        "seconds_of_each_run": [run["seconds"] for run in runs],
        "cpu_seconds": statistics.median(run["cpu_seconds"] for run in runs),
        "parts": parts,
        **shares(parts),
        "calls": runs[0]["calls"],
        "peak_resident_bytes": max(run["peak_resident_bytes"] for run in runs),
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
        "peak_anonymous_bytes_by_part": {
            part: max(run["peak_anonymous_bytes_by_part"].get(part, 0) for run in runs) for part in sorted(peaks)
        },
        "layers_with_searched_heads": runs[0]["layers_with_searched_heads"],
    }
