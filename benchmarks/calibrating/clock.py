"""A clock for parts that nest, and where it is put into the converter."""

from __future__ import annotations

import functools
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any


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
    from regroup.calibration import calibrate, candidates, groupings, layer_regression, layer_runner
    from regroup.calibration import decoder_layer as decoder
    from regroup.calibration.repair import Regression
    from regroup.conversion import convert
    from regroup.solver.heads import HeadWeights
    from regroup.solver.solve import LayerSolver
    from regroup.solver.store import SolutionStore

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
    during(lambda *_: "candidate" if passes[-1] == "candidate" else "refit")(layer_regression.LayerRegression, "refit")
    clock.wrap(layer_runner.LayerRunner, "__init__", "load")
    clock.wrap(layer_runner.LayerRunner, "layer", lambda *_: None if clock.stack[-1] == "load" else "copy weights")
    clock.wrap(decoder.DecoderLayer, "copy", "copy weights")
    clock.wrap(HeadWeights, "read", "copy weights")
    clock.wrap(candidates.Candidates, "put", "copy weights")
    clock.wrap(decoder.DecoderLayer, "observe", watched)
    clock.wrap(decoder.DecoderLayer, "forward", run)
    clock.wrap(groupings.Groupings, "add_for_search", "search moments")
    clock.wrap(groupings.Groupings, "add", "moments")
    clock.wrap(groupings, "best_order", "head search")
    clock.wrap(LayerSolver, "keys", "solve keys")
    clock.wrap(LayerSolver, "values", "solve values")
    clock.wrap(Regression, "add", lambda *_: f"{passes[-1]} sums")
    clock.wrap(layer_regression, "refit_output", lambda *_: f"{passes[-1]} solve")
    clock.wrap(convert, "write", "write")
    clock.wrap(SolutionStore, "keep", "write")
    clock.wrap(SolutionStore, "keep_states", "write")
    clock.wrap(calibrate, "divergences", "held-out KL")
