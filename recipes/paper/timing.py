"""Seconds a sample of decoding, with the models taking turns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from regroup.bench.decode import measure
from regroup.bench.machine import quantiles
from regroup.bench.work import Work, models_for

from .variants import Bench, Variant

ROUNDS = 5


def time_models(bench: Bench, found: dict[str, Variant], say: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Decode the same number of tokens after the same input with every model, ``ROUNDS`` times in turns.

    Times are of the decoder alone, as in `regroup bench decode`: an encoder does not change, and its output is made up.

    Returns:
        By name, ``seconds_per_sample`` with its 20, 50 and 80% quantiles, and ``cache_bytes`` of the whole batch.
    """
    scale = bench.scale
    work = Work(scale.decode_batch, scale.decode_prompt, scale.decode_new, scale.dtype, bench.device)
    times: dict[str, list[float]] = {name: [] for name in found}
    cache: dict[str, int | None] = {}
    for _ in range(ROUNDS):
        for name, variant in found.items():
            (model,) = models_for(str(bench.checkpoint(variant)), None, work)
            timing = measure(model, work)["regroup"]
            times[name].append((timing.first[0] + sum(timing.tokens)) / work.batch)
            cache[name] = timing.cache_bytes
    for name, values in times.items():
        say(f"decoding: {name}: {1e3 * quantiles(values)['p50']:.2f} ms per sample")
    return {
        name: {"seconds_per_sample": quantiles(values), "cache_bytes": cache[name]} for name, values in times.items()
    }
