"""Time and memory of a conversion, compared with `cp -r` of the same folder.

    python benchmarks/conversion.py --gigabytes 4 --output benchmarks/records/conversion.json

A synthetic sharded Llama (hidden 4096, 32 heads of 128, bfloat16, random weights) is made once. Then, alternating in
one run: `cp -r`, `cp -r` followed by a flush of what it wrote (which regroup always does), and `regroup convert
--kv-heads 8 --method mean` in its own process. The page cache is dropped before each if the system allows it; otherwise
all are warm.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from regroup.record import record, write_record

HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
HEAD_DIM = 128


def make_llama(folder: Path, gigabytes: float, hidden: int = HIDDEN, shard_layers: int = 2) -> None:
    """A checkpoint of Llama 2 7B's proportions, its depth cut to a size, with a number of layers per shard."""
    import torch
    from safetensors.torch import save_file

    intermediate, vocabulary = hidden * INTERMEDIATE // HIDDEN, VOCABULARY * hidden // HIDDEN
    layer_bytes = 2 * (4 * hidden * hidden + 3 * hidden * intermediate + 2 * hidden)
    layers = max(1, round((gigabytes * 1e9 - 4 * vocabulary * hidden) / layer_bytes))
    folder.mkdir(parents=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "num_hidden_layers": layers,
        "vocab_size": vocabulary,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(0)

    def weights(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def layer(i: int) -> dict[str, torch.Tensor]:
        at = f"model.layers.{i}."
        tensors = {f"{at}self_attn.{x}_proj.weight": weights(hidden, hidden) for x in "qkvo"}
        tensors |= {f"{at}mlp.{x}_proj.weight": weights(intermediate, hidden) for x in ("gate", "up")}
        tensors[f"{at}mlp.down_proj.weight"] = weights(hidden, intermediate)
        tensors |= {f"{at}{x}_layernorm.weight": weights(hidden) for x in ("input", "post_attention")}
        return tensors

    starts = list(range(0, layers, shard_layers))
    weight_map: dict[str, str] = {}
    total = 0
    for number, start in enumerate(starts, 1):
        shard = {k: v for i in range(start, min(start + shard_layers, layers)) for k, v in layer(i).items()}
        if number == 1:
            shard["model.embed_tokens.weight"] = weights(vocabulary, hidden)
        if number == len(starts):
            shard |= {"lm_head.weight": weights(vocabulary, hidden), "model.norm.weight": weights(hidden)}
        name = f"model-{number:05d}-of-{len(starts):05d}.safetensors"
        save_file(shard, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(shard, name)
        total += sum(value.nbytes for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def drop_caches() -> bool:
    """Write everything out and forget cached pages; False where the system does not allow it."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def timed(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_memory(command: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a child process."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)} failed with status {status}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def convert_command(source: Path, target: Path, method: str = "mean", heads: int = 8) -> list[str]:
    regroup = str(Path(sys.executable).with_name("regroup"))
    return [regroup, "convert", str(source), str(target), "--kv-heads", str(heads), "--method", method]


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint.")] = 4.5,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    scratch: Annotated[Path | None, typer.Option(help="A folder on the disk to measure.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        source, small = root / "source", root / "small"
        # In their own processes: the peak memory of a child process includes its parent's memory at the start.
        for folder, size in ((source, gigabytes), (small, gigabytes / 4)):
            maker = multiprocessing.get_context("spawn").Process(target=make_llama, args=(folder, size))
            maker.start()
            maker.join()
        flush = f"cp -r {source} {root / 'copy'} && sync -f {root / 'copy'}"
        actions: dict[str, list[str]] = {
            "cp_r": ["cp", "-r", str(source), str(root / "copy")],
            "cp_r_and_flush": ["sh", "-c", flush],
            "convert": convert_command(source, root / "converted"),
        }
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        memory: list[int] = []
        dropped = True
        for _ in range(repeats):
            for what, command in actions.items():
                dropped &= drop_caches()
                took, peak = peak_memory(command)
                seconds[what].append(took)
                if what == "convert":
                    memory.append(peak)
                for folder in ("copy", "converted"):
                    shutil.rmtree(root / folder, ignore_errors=True)
        _, small_memory = peak_memory(convert_command(small, root / "converted"))
        # What a process costs that does nothing: imports of torch and friends.
        idle_seconds, idle_memory = peak_memory([*convert_command(source, root / "none"), "--dry-run"])
        size = sum(path.stat().st_size for path in source.iterdir())
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    results = {
        "source_bytes": size,
        "page_cache_dropped": dropped,
        "seconds": seconds,
        "median_seconds": medians,
        "ratio_to_cp_r": medians["convert"] / medians["cp_r"],
        "ratio_to_cp_r_and_flush": medians["convert"] / medians["cp_r_and_flush"],
        "peak_memory_bytes": max(memory),
        "peak_memory_bytes_at_a_quarter_of_the_size": small_memory,
        "dry_run_seconds": idle_seconds,
        "dry_run_peak_memory_bytes": idle_memory,
    }
    write_record(output, record("benchmark/conversion", {"gigabytes": gigabytes, "repeats": repeats}, results))


if __name__ == "__main__":
    typer.run(main)
