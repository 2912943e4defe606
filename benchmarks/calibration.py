"""How long conversion on text takes and how much memory, where the time goes, and whether it grows linearly.

    python benchmarks/calibration.py --output benchmarks/records/calibration.json
    python benchmarks/calibration.py --full --output benchmarks/records/calibration-full.json

The parent is a Llama of 1B parameters (hidden 2048, 32 heads of 64, 16 layers, bfloat16, random weights), the text
random tokens in windows of 2048, the child has 8 KV heads; methods and repair are the defaults of `regroup convert
--calibration`. At full size, 16 layers and 128 windows, that takes hours on a few cores. The default run therefore
measures parents cut to fewer layers on fewer windows, each in a process of its own, and works out the full size from
them: the seconds of each part for each time that it ran, times how often it would run. Those figures are named
"extrapolated" wherever they stand. ``--full`` measures the full size instead. The default takes about ten minutes on
two idle cores with AVX-512.

The parts are timed from outside, by wrapping the functions that do them; a part's seconds leave out what parts inside
it took.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.table import Table

from regroup.record import record, write_record

FULL_LAYERS, FULL_WINDOWS = 16, 128

# Every part that is told apart, by what it is: the table has them in this order.
FORWARD = ("parent forward", "search forward", "candidate forward", "refit forward", "child forward")
ALGEBRA = (
    "search moments",
    "moments",
    "head search",
    "solve keys",
    "solve values",
    "candidate sums",
    "candidate solve",
    "refit sums",
    "refit solve",
)
REST = ("load", "copy weights", "held-out KL", "write", "other")


@dataclass(frozen=True)
class Shape:
    """The parent, but for its layers, and what becomes of it."""

    hidden: int = 2048
    intermediate: int = 5632
    heads: int = 32
    vocabulary: int = 32000
    window: int = 2048
    kv_heads: int = 8

    def parameters(self, layers: int) -> int:
        layer = 4 * self.hidden**2 + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return layers * layer + 2 * self.vocabulary * self.hidden + self.hidden


TINY = Shape(hidden=64, intermediate=128, heads=8, vocabulary=256, window=64, kv_heads=2)


@dataclass(frozen=True)
class Point:
    """One measurement."""

    layers: int
    windows: int


class Clock:
    """Seconds and peak anonymous memory by part, and how often each part ran. Parts nest; the innermost counts."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.calls: Counter[str] = Counter()
        self.peaks: dict[str, int] = {}
        self.stack = ["other"]
        self._since = time.perf_counter()

    def enter(self, part: str) -> None:
        self._book()
        self.stack.append(part)
        self.calls[part] += 1

    def leave(self) -> None:
        self._book()
        self.stack.pop()

    def watch_memory(self, done: threading.Event, every: float = 0.01) -> None:
        """Sample until done; meant for a thread. Peaks shorter than the interval may be missed."""
        while not done.wait(every):
            part, size = self.stack[-1], memory("RssAnon")
            self.peaks[part] = max(self.peaks.get(part, 0), size)

    def wrap(self, owner: Any, name: str, part: str | Callable[..., str | None]) -> None:
        """Time a function or method; ``part`` may decide by its arguments, None counting it to whatever calls it."""
        inner = getattr(owner, name)

        @functools.wraps(inner)
        def timed(*args: Any, **kwargs: Any) -> Any:
            chosen = part if isinstance(part, str) else part(*args, **kwargs)
            if chosen is None:
                return inner(*args, **kwargs)
            self.enter(chosen)
            try:
                return inner(*args, **kwargs)
            finally:
                self.leave()

        setattr(owner, name, timed)

    def _book(self) -> None:
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self._since
        self._since = now


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes; 0 where there is none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:")), 0)


def instrument(clock: Clock) -> None:
    """Wrap what calibration and writing call, so that the clock sees which part runs."""
    from regroup.convert import calibrate, candidates, decoder, grouping, layers, lesson
    from regroup.convert.heads import HeadWeights
    from regroup.convert.repair import Regression

    # Which pass over the text the functions below are called from.
    passes = ["parent"]

    def during(name: Callable[..., str]) -> Callable[[Any, str], None]:
        def wrap(owner: Any, function: str) -> None:
            inner = getattr(owner, function)

            @functools.wraps(inner)
            def marked(*args: Any, **kwargs: Any) -> Any:
                passes.append(name(*args, **kwargs))
                try:
                    return inner(*args, **kwargs)
                finally:
                    passes.pop()

            setattr(owner, function, marked)

        return wrap

    def watched(*_: Any, whole: bool, **__: Any) -> str:
        return f"{'search' if passes[-1] == 'parent' and not whole else passes[-1]} forward"

    def run(self: Any, *_: Any, **__: Any) -> str | None:
        # Within ``observe`` and while the stream is set up the pass counts as what that is.
        return "child forward" if clock.stack[-1] == "other" else None

    during(lambda *_: "candidate")(candidates.Candidates, "error")
    during(lambda *_: "candidate" if passes[-1] == "candidate" else "refit")(lesson.Lesson, "refit")
    clock.wrap(layers.LayerStream, "__init__", "load")
    clock.wrap(layers.LayerStream, "layer", lambda *_: None if clock.stack[-1] == "load" else "copy weights")
    clock.wrap(decoder.DecoderLayer, "copy", "copy weights")
    clock.wrap(HeadWeights, "read", "copy weights")
    clock.wrap(candidates.Candidates, "put", "copy weights")
    clock.wrap(decoder.DecoderLayer, "observe", watched)
    clock.wrap(decoder.DecoderLayer, "forward", run)
    clock.wrap(grouping.Groupings, "look", "search moments")
    clock.wrap(grouping.Groupings, "add", "moments")
    clock.wrap(grouping, "searched", "head search")
    clock.wrap(candidates, "solve_keys", "solve keys")
    clock.wrap(candidates, "solve_values", "solve values")
    clock.wrap(Regression, "add", lambda *_: f"{passes[-1]} sums")
    clock.wrap(lesson, "refit_output", lambda *_: f"{passes[-1]} solve")
    clock.wrap(calibrate._Loop, "_keep", "write")
    clock.wrap(calibrate, "divergences", "held-out KL")


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

    from regroup.convert import prepare, write
    from regroup.convert.attention import Settings
    from regroup.pipeline import calibrated, choose_plan, open_source

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
        plan = choose_plan(
            opened.layout, None, kv_heads=shape.kv_heads, layers=None, method="auto", tensor_parallel=None, seed=None
        )
        with calibrated(opened, plan, batches, Settings(), scratch=scratch, device=device) as solved:
            clock.enter("write")
            ready = prepare(
                opened.checkpoint, opened.layout, solved.plan, parent="parent", given=solved.given, calibration={}
            )
            write(ready, scratch / "child")
            clock.leave()
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    orders = sum(layer.query_order is not None for layer in solved.plan.layers)
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


def shares(parts: dict[str, float]) -> dict[str, float]:
    """Seconds in forward passes and in linear algebra, and how these compare."""
    forward, algebra = (sum(parts[part] for part in group) for group in (FORWARD, ALGEBRA))
    return {
        "forward_seconds": forward,
        "linear_algebra_seconds": algebra,
        "linear_algebra_to_forward": algebra / forward,
    }


def line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Slope, intercept and R² of the least-squares line."""
    slope, intercept = statistics.linear_regression(x, y)
    return slope, intercept, statistics.correlation(x, y) ** 2


def linearity(points: Sequence[dict[str, Any]], along: str, what: Callable[[dict[str, Any]], float]) -> dict[str, Any]:
    """How straight a figure grows along an axis: R² of a line, and what a step costs at the end beside the start.

    A ratio of marginal costs of 1 is a straight line, below 1 the cost of a further unit falls.
    """
    x, y = [float(point[along]) for point in points], [what(point) for point in points]
    slope, intercept, fit = line(x, y)
    steps = [(y[i + 1] - y[i]) / (x[i + 1] - x[i]) for i in range(len(x) - 1)]
    return {
        along: [point[along] for point in points],
        "values": y,
        "slope": slope,
        "intercept": intercept,
        "r_squared": fit,
        "marginal_costs": steps,
        "ratio_of_marginal_costs": steps[-1] / steps[0],
    }


def passes_of(windows: int, window: int) -> dict[str, int]:
    """How many windows each kind of pass takes, as the converter itself divides them: fitted, judged on, held out."""
    import torch

    from regroup.convert.attention import AttentionWorker, Settings

    stream = SimpleNamespace(batches=[None] * windows, hidden=[torch.empty(1, window, 0)])
    worker = AttentionWorker(cast(Any, None), cast(Any, stream), Settings())
    return {"all": windows, "fit": len(worker.fit), "judging": len(worker.judging), "held_out": len(worker.held_out)}


def expected_calls(point: Point, window: int, candidates: float) -> dict[str, float]:
    """How often the parts run that run once a window, for so many candidates a layer."""
    found = passes_of(point.windows, window)
    tries = candidates * (found["judging"] + found["held_out"])
    once = {
        "parent forward": found["all"],
        "search forward": found["judging"],
        "search moments": found["judging"],
        "moments": found["fit"],
        "candidate forward": tries,
        "candidate sums": tries,
        "refit forward": found["all"],
        "refit sums": found["all"],
        "child forward": found["all"],
    }
    return {part: point.layers * count for part, count in once.items()}


def extrapolated(points: Sequence[dict[str, Any]], full: Point, shape: Shape) -> dict[str, Any]:
    """The full size from the points: seconds for each time a part ran, times how often it would run.

    What runs once a window is taken from the point with the most windows, what runs once a layer or whose calls do not
    depend on the windows from all layers of all points.
    """
    largest = max(points, key=lambda point: (point["windows"], point["layers"]))
    layers = sum(point["layers"] for point in points)
    candidates = sum(point["calls"].get("candidate solve", 0) for point in points) / layers
    calls = expected_calls(full, shape.window, candidates)
    parts: dict[str, float] = {}
    for part in FORWARD + ALGEBRA + REST:
        if part in calls:
            parts[part] = largest["parts"][part] / max(1, largest["calls"].get(part, 0)) * calls[part]
        else:
            parts[part] = sum(point["parts"][part] for point in points) / layers * full.layers
    # Done once, whatever the layers: a plane through the first point, which has the fewest layers and windows.
    least = points[0]
    parts["load"] = least["parts"]["load"]
    for along in ("layers", "windows"):
        other = "windows" if along == "layers" else "layers"
        same = [point for point in points if point[other] == least[other]]
        if len(same) > 1:
            slope, _ = line([point[along] for point in same], [point["parts"]["load"] for point in same])[:2]
            parts["load"] += max(0.0, slope) * (getattr(full, along) - least[along])
    held_out = passes_of(largest["windows"], shape.window)["held_out"]
    parts["held-out KL"] = (
        largest["parts"]["held-out KL"] / held_out * passes_of(full.windows, shape.window)["held_out"]
    )
    peaks: dict[str, float] = {}
    one = [point for point in points if point["layers"] == largest["layers"]]
    for part in largest["peak_anonymous_bytes_by_part"]:
        # Too short to be sampled at every size.
        if len(one) > 1 and all(part in point["peak_anonymous_bytes_by_part"] for point in one):
            sizes = [point["peak_anonymous_bytes_by_part"][part] for point in one]
            slope, intercept, _ = line([point["windows"] for point in one], sizes)
            peaks[part] = intercept + slope * full.windows
    highest = max(peaks, key=lambda part: peaks[part]) if peaks else None
    return {
        **asdict(full),
        "candidates_a_layer": candidates,
        "extrapolated_seconds": sum(parts.values()),
        "extrapolated_parts": parts,
        **{f"extrapolated_{name}": value for name, value in shares(parts).items()},
        "extrapolated_peak_anonymous_bytes": peaks[highest] if highest else None,
        "extrapolated_peak_is_in": highest,
    }


def summary(points: Sequence[dict[str, Any]], by_windows: list[int], by_layers: list[int]) -> dict[str, Any]:
    """Linearity along both axes."""

    def at(layers: Sequence[int], windows: Sequence[int]) -> list[dict[str, Any]]:
        found = [point for point in points if point["layers"] in layers and point["windows"] in windows]
        return sorted(found, key=lambda point: (point["layers"], point["windows"]))

    def seconds(point: dict[str, Any]) -> float:
        # Loading the parent and the first layer's inputs are no part of what layers cost.
        return point["seconds"] - point["parts"]["load"]

    def once_a_window(point: dict[str, Any]) -> float:
        return (
            sum(point["parts"][part] for part in ("parent forward", "moments", "refit forward", "refit sums"))
            + (point["parts"]["child forward"])
        )

    found: dict[str, Any] = {}
    if len(by_layers) > 2:
        along = at(by_layers, by_windows[:1])
        found["seconds_by_layers"] = linearity(along, "layers", seconds)
    if len(by_windows) > 2:
        along = at(by_layers[:1], by_windows)
        found["seconds_by_windows"] = linearity(along, "windows", seconds)
        # Candidates are fitted on a limited number of tokens, so all seconds together grow by less than a line.
        found["seconds_of_passes_over_all_windows"] = linearity(along, "windows", once_a_window)
        found["peak_anonymous_bytes_by_windows"] = linearity(along, "windows", lambda p: p["peak_anonymous_bytes"])
    return found


def show(points: Sequence[dict[str, Any]], ahead: dict[str, Any] | None) -> None:
    """Where the time goes, as a table: a column for each point, seconds and shares of the whole."""
    table = Table(title="Seconds of calibrating and converting", caption="*: extrapolated, not measured")
    table.add_column("part")
    columns = [(f"{p['layers']} × {p['windows']}", p["parts"], p["peak_anonymous_bytes"]) for p in points]
    if ahead is not None:
        columns.append(
            (
                f"{ahead['layers']} × {ahead['windows']} *",
                ahead["extrapolated_parts"],
                ahead["extrapolated_peak_anonymous_bytes"],
            )
        )
    for name, _, _ in columns:
        table.add_column(name, justify="right")

    def cell(value: float, parts: dict[str, float]) -> str:
        return f"{value:.1f} ({value / sum(parts.values()):4.0%})"

    for title, group in (("forward passes", FORWARD), ("linear algebra", ALGEBRA), ("the rest", REST)):
        table.add_section()
        table.add_row(title, *(cell(sum(parts[p] for p in group), parts) for _, parts, _ in columns), style="bold")
        for part in group:
            table.add_row(f"  {part}", *(cell(parts[part], parts) for _, parts, _ in columns))
    table.add_section()
    table.add_row("all", *(f"{sum(parts.values()):.1f}" for _, parts, _ in columns), style="bold")
    table.add_row("peak anonymous GB", *("–" if size is None else f"{size / 1e9:.2f}" for _, _, size in columns))
    # Standard output is the record's where no file is named.
    Console(stderr=True, width=None if sys.stderr.isatty() else 160).print(table)


def numbers(text: str) -> list[int]:
    return sorted({int(part) for part in text.split(",")})


def main(
    layers: Annotated[str, typer.Option(help="Layers of the parents, on the fewest windows.")] = "1,2,3",
    windows: Annotated[str, typer.Option(help="Windows, for the parent of the fewest layers.")] = "4,8,16",
    repeats: Annotated[int, typer.Option(min=1)] = 1,
    full: Annotated[bool, typer.Option("--full", help="Measure 16 layers and 128 windows, and nothing else.")] = False,
    tiny: Annotated[bool, typer.Option("--tiny", help="A parent of toy size, to try this program.")] = False,
    device: Annotated[str, typer.Option(help="Where layers run.")] = "cpu",
    scratch: Annotated[Path | None, typer.Option(help="A folder with room for parent and child.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o")] = None,
) -> None:
    """Measure conversion on text."""
    shape = TINY if tiny else Shape()
    whole = Point(FULL_LAYERS, FULL_WINDOWS)
    by_layers, by_windows = numbers(layers), numbers(windows)
    grid = [whole] if full else [Point(by_layers[0], count) for count in by_windows]
    if not full:
        grid += [Point(count, by_windows[0]) for count in by_layers[1:]]
    points: list[dict[str, Any]] = []
    start = time.perf_counter()
    for point in grid:
        points.append(measured(point, shape, repeats, device, scratch))
        print(f"{point.layers} layers, {point.windows} windows: {points[-1]['seconds']:.1f} s", file=sys.stderr)
    ahead = None if full else extrapolated(points, whole, shape)
    results = {
        "points": points,
        "linearity": {} if full else summary(points, by_windows, by_layers),
        "seconds_of_this_program": time.perf_counter() - start,
    }
    if ahead is not None:
        results["extrapolated"] = ahead
    show(points, ahead)
    configuration = {
        **asdict(shape),
        "parameters_at_full_size": shape.parameters(FULL_LAYERS),
        "dtype": "bfloat16",
        "weights": "random",
        "text": "random tokens",
        "batch": 1,
        "method": "auto",
        "grouping": "search",
        "repair": "output",
        "device": device,
        "repeats": repeats,
    }
    write_record(output, record("benchmark/calibration", configuration, results))


if __name__ == "__main__":
    typer.run(main)
