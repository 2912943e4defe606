"""Milliseconds per token of a Llama shape of 1.1B parameters, in regroup and in other engines, two at a time.

    python benchmarks/decode_engines.py --engine llama.cpp --dtype float32 --python ENGINES/bin/python \
        --models FOLDER --work FILE                    # one pair, some minutes; for each engine and dtype
    python benchmarks/decode_engines.py --work FILE -o benchmarks/records/decode-engines.json

Each run holds regroup and one other engine in memory, each in a process of its own, and lets them take turns: while
one decodes, the other waits without working. Between turns this program measures how fast memory is read, so that the
floor is of the same minutes. The dtype of weights, cache and arithmetic is the same in both. Caches are filled before
(with random keys and values where an engine lets one, else with a prompt), models are compiled and warm.

The other engines need an environment of their own (``--python``): pip install llama-cpp-python gguf ctranslate2
openvino optimum-intel. Models of 2 to 5 GB are written to ``--models`` at their first use.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from regroup.bench.build import describe
from regroup.bench.machine import quantiles
from regroup.bench.work import Roofs, Work
from regroup.record import record, write_record

HERE = Path(__file__).with_name("engines")
sys.path.insert(0, str(HERE))
import shape  # noqa: E402  # pyright: ignore[reportMissingImports]

CASES = ((512, 1), (512, 8), (2048, 8))
ENGINES = ("transformers", "llama.cpp", "llama.cpp without flash attention", "ctranslate2", "openvino")


def command(engine: str, dtype: str, python: str, models: Path) -> list[str]:
    """How to start an engine."""
    if engine in ("regroup", "transformers"):
        return [sys.executable, str(HERE / "transformers_worker.py"), dtype, engine]
    if engine.startswith("llama.cpp"):
        flash = "0" if "without" in engine else "1"
        return [python, str(HERE / "llama_cpp_worker.py"), str(models), dtype, flash]
    return [python, str(HERE / f"{engine}_worker.py"), str(models), dtype]


class Worker:
    """An engine in a process of its own."""

    def __init__(self, arguments: list[str]) -> None:
        # A file, not a pipe: some engines write more than a pipe holds, and would wait for a reader.
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )
        self.facts = self._hear()

    def ask(self, **request: Any) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # what it said last tells more
        return self._hear()

    def _hear(self) -> Any:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if line:
            return json.loads(line)
        status = self.process.wait()
        self.said.seek(0)
        said = [line for line in self.said.read().splitlines() if line.strip()]
        raise RuntimeError(said[-1][:400] if said else f"ended with status {status}")

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.said.close()


def pair(
    engine: str, dtype: str, python: str, models: Path, rounds: int, steps: int, keep: Callable[[dict[str, Any]], None]
) -> None:
    """regroup and another engine, in turns; what is found so far is kept after each case."""
    found: dict[str, Any] = {"engine": engine, "dtype": dtype, "cases": []}
    workers: dict[str, Worker] = {}
    try:
        for name in (engine, "regroup"):
            workers[name] = Worker(command(name, dtype, python, models))
        found["facts"] = {name: worker.facts for name, worker in workers.items()}
        model = describe(shape.CONFIG, kv_heads=None, layers=None)
        roofs = None
        for prompt, batch in CASES:
            work = Work(batch, prompt, 2 * steps, dtype)
            roofs = Roofs(work) if roofs is None else roofs.for_work(work)
            for worker in workers.values():
                worker.ask(do="prepare", batch=batch, prompt=prompt, steps=steps)
            seconds: dict[str, list[float]] = {name: [] for name in workers}
            floors = []
            for _ in range(rounds):
                floors.append(roofs.ceiling(model, again=True))
                for name, worker in workers.items():
                    seconds[name] += worker.ask(do="steps", count=steps)
            case: dict[str, Any] = {
                "prompt": prompt,
                "batch": batch,
                "bandwidth_bytes_per_second": statistics.median(ceiling.bandwidth for ceiling in floors),
                "token_ms": {
                    name: {key: 1e3 * value for key, value in quantiles(values).items()}
                    for name, values in seconds.items()
                },
                "steps": len(seconds["regroup"]),
            }
            case["regroup_is_faster_by"] = case["token_ms"][engine]["p50"] / case["token_ms"]["regroup"]["p50"]
            found["cases"].append(case)
            keep(found)
            print(json.dumps(case), file=sys.stderr)
    except RuntimeError as error:
        found["failed"] = str(error)
        keep(found)
        print(f"{engine}, {dtype}: {error}", file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.end()


def main(
    work: Annotated[Path, typer.Option(help="File that keeps what is measured, a line for each pair.")],
    engine: Annotated[str | None, typer.Option(help=f"One of {', '.join(ENGINES)}.")] = None,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    python: Annotated[
        str, typer.Option(help="Interpreter of the environment with the other engines.")
    ] = sys.executable,
    models: Annotated[Path, typer.Option(help="Folder for the engines' models.")] = Path("engine-models"),
    rounds: Annotated[int, typer.Option(min=1)] = 4,
    steps: Annotated[int, typer.Option(min=1, help="Tokens a turn.")] = 8,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    if engine is not None:
        if engine not in ENGINES:
            raise typer.BadParameter(f"one of {', '.join(ENGINES)}")
        models.mkdir(parents=True, exist_ok=True)

        def keep(found: dict[str, Any]) -> None:
            with work.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")

        pair(engine, dtype, python, models, rounds, steps, keep)
    if output is not None:
        # A pair that has more cases by now, or was measured again, counts as it was last.
        lines = [json.loads(line) for line in work.read_text(encoding="utf-8").splitlines()]
        pairs = {(line["engine"], line["dtype"]): line for line in lines}
        configuration = {"config": shape.CONFIG, "cases": [{"prompt": p, "batch": b} for p, b in CASES]}
        write_record(output, record("benchmark/decode-engines", configuration, {"pairs": list(pairs.values())}))


if __name__ == "__main__":
    typer.run(main)
