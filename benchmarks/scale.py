"""A large conversion: time compared with `cp -r` and a flush, memory, the dry run's estimates, and a kill half-way.

    python benchmarks/scale.py --gigabytes 20 --output benchmarks/records/scale.json

A synthetic sharded Llama (Llama 2 7B's width, as many layers as the size allows, bfloat16, random weights) is made
once, one shard at a time. Then, for each method: the dry run; `cp -r` with a flush and `regroup convert` in turns, page
cache dropped before each if the system allows it; the part of the time that starts a process and imports torch; and
another conversion that gets SIGKILL when half of its weight files are finished, followed by the same command, whose
result must equal that of the uninterrupted one, byte for byte. The disk holds the source and two converted models:
three times the size.
"""

from __future__ import annotations

import filecmp
import functools
import json
import multiprocessing
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from conversion import HIDDEN, convert_command, drop_caches, make_llama  # pyright: ignore[reportMissingImports]
from regroup.conversion.convert import convert
from regroup.record import record, write_record
from regroup.writer.journal import JOURNAL_FILE


def in_process(action: Callable[[], Any]) -> Any:
    """The result of a function that runs in its own process, which frees its memory and threads."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(action)


def estimate(source: Path, target: Path, method: str, heads: int) -> dict[str, Any]:
    """The estimates of a dry run."""
    started = time.perf_counter()
    done = convert(source, target, kv_heads=heads, method=method, dry_run=True)
    assert done.estimate is not None
    facts = asdict(done.estimate) | {"seconds": done.estimate.seconds}
    facts.pop("folder")  # where the benchmark ran
    return facts | {"dry_run_seconds": time.perf_counter() - started}


def watched(command: list[str], *, stop: Callable[[], bool] = lambda: False) -> dict[str, Any]:
    """Run a process, and kill it when ``stop`` returns True.

    Returns:
        Its seconds; whether it was killed; the most anonymous memory (RssAnon) that was seen, and the most resident
        memory (VmHWM), which counts pages of mapped files too, in bytes.
    """
    most = {"RssAnon": 0, "VmHWM": 0}
    killed = False
    started = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except OSError:
            lines = []
        for line in lines:
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], int(value.split()[0]) * 1024)
        if stop():
            process.send_signal(signal.SIGKILL)
            killed = True
        time.sleep(0.02)
    if process.returncode and not killed:
        raise RuntimeError(f"{' '.join(command)} failed with status {process.returncode}")
    return {
        "seconds": time.perf_counter() - started,
        "killed": killed,
        "peak_anonymous_bytes": most["RssAnon"],
        "peak_resident_bytes": most["VmHWM"],
    }


def finished(target: Path) -> list[str]:
    """The weight files that a conversion to this folder has finished."""
    for journal in target.parent.glob(f".{target.name}.regroup-*/{JOURNAL_FILE}"):
        try:
            return json.loads(journal.read_text())["finished"]
        except OSError:
            return []
    return []


def resumed(source: Path, target: Path, whole: Path, method: str, heads: int) -> dict[str, Any]:
    """Kill a conversion when half of its files are finished, resume it, and compare with an uninterrupted one."""
    command = convert_command(source, target, method, heads)
    files = len(list(source.glob("*.safetensors")))
    first = watched(command, stop=lambda: len(finished(target)) >= files // 2)
    kept = finished(target)
    second = watched(command)
    names = [path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()]
    _, different, missing = filecmp.cmpfiles(whole, target, names, shallow=False)
    if not first["killed"] or different or missing:
        raise RuntimeError(f"killed: {first['killed']}; different: {different}; missing: {missing}")
    return {
        "weight_files": files,
        "finished_when_killed": len(kept),
        "seconds_until_killed": first["seconds"],
        "seconds_to_go_on": second["seconds"],
        "files_compared": len(names),
    }


def measure(root: Path, source: Path, method: str, heads: int, repeats: int) -> dict[str, Any]:
    """All measurements of one method."""
    copy, converted = root / "copy", root / "converted"
    estimated = in_process(functools.partial(estimate, source, converted, method, heads))
    copies: list[float] = []
    runs: list[dict[str, Any]] = []
    dropped = True
    for _ in range(repeats):
        dropped &= drop_caches()
        copies.append(watched(["sh", "-c", f"cp -r {source} {copy} && sync -f {copy}"])["seconds"])
        shutil.rmtree(copy)
        shutil.rmtree(converted, ignore_errors=True)
        dropped &= drop_caches()
        runs.append(watched(convert_command(source, converted, method, heads)))
    drop_caches()
    start = watched([sys.executable, "-c", "import regroup.conversion.convert, regroup.console"])
    kill = resumed(source, root / "again", converted, method, heads)
    for folder in (converted, root / "again"):
        shutil.rmtree(folder)
    seconds = [run["seconds"] for run in runs]
    return {
        "forecast": estimated,
        "page_cache_dropped": dropped,
        "cp_r_and_flush_seconds": copies,
        "convert_seconds": seconds,
        "of_which_start_seconds": start["seconds"],
        "ratio_to_cp_r_and_flush": statistics.median(seconds) / statistics.median(copies),
        "peak_anonymous_bytes": max(run["peak_anonymous_bytes"] for run in runs),
        "peak_resident_bytes": max(run["peak_resident_bytes"] for run in runs),
        "killed_and_resumed": kill,
    }


def main(
    gigabytes: Annotated[float, typer.Option(help="Size of the checkpoint.")] = 20.0,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 128; smaller: more layers.")] = HIDDEN,
    methods: Annotated[str, typer.Option()] = "mean,lowrank",
    repeats: Annotated[int, typer.Option(min=1)] = 2,
    scratch: Annotated[Path | None, typer.Option(help="A folder on the disk to measure.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        root = Path(name)
        free = shutil.disk_usage(root).free
        if free < 3.1e9 * gigabytes:
            raise SystemExit(f"the disk has {free / 1e9:.0f} GB free, and {3.1 * gigabytes:.0f} GB are needed")
        source, heads = root / "source", max(1, hidden // 512)
        started = time.perf_counter()
        in_process(functools.partial(make_llama, source, gigabytes, hidden, 2 if hidden == HIDDEN else 1))
        os.sync()
        making = time.perf_counter() - started
        size = sum(path.stat().st_size for path in source.iterdir())
        found = {method: measure(root, source, method, heads, repeats) for method in methods.split(",")}
    configuration = {"gigabytes": gigabytes, "hidden": hidden, "kv_heads": heads, "repeats": repeats}
    results = {"source_bytes": size, "seconds_to_make_the_source": making, "methods": found}
    write_record(output, record("benchmark/scale", configuration, results))


if __name__ == "__main__":
    typer.run(main)
