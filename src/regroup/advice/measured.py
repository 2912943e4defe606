"""Rates of the target hardware, and the efficiency of steps in bench records."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench.build import Model, describe
from ..bench.machine import product_rate, read_bandwidth
from ..bench.work import Work, middle_context, step_costs
from ..checkpoint.reader import read_json
from ..errors import RegroupError
from ..listener import Listener
from .hardware import Hardware
from .predict import Efficiency, Rates, between, fit, step_floors, step_seconds

_PROMPT_ROWS = 512
# The bandwidth is measured with a block of the size that a step reads, within these bounds: a small model stays in the
# caches, and a block of the upper bound exceeds all caches.
_LEAST_READ, _MOST_READ = 1 << 20, 512 << 20


@dataclass(frozen=True)
class MeasuredRates:
    """Rates of this machine, measured once for all candidates.

    Comparable times need the same rates, but rates of shared machines change within minutes. Attention has one rate per
    dtype, the best over the candidates' queries per KV head, so that a smaller cache is never predicted to be slower.

    Attributes:
        bandwidth: bytes per second.
        products: operations per second, by dtype, rows, and length of the sums.
        attention: operations per second of attention, by dtype.
        seconds: duration of the measurement.
    """

    bandwidth: float
    products: Mapping[tuple[str, int, int], float]
    attention: Mapping[str, float]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """For the record; units are in the names."""
        return {
            "read_bandwidth_bytes_per_second": self.bandwidth,
            "matrix_rates_flops_per_second": {
                f"{dtype}, {rows} rows of {inner}": rate for (dtype, rows, inner), rate in self.products.items()
            },
            "attention_rates_flops_per_second": dict(self.attention),
            "seconds": self.seconds,
        }


def measure(
    device: str,
    models: Sequence[Model],
    works: Sequence[Work],
    others: Sequence[tuple[Model, Work]] = (),
    listener: Listener | None = None,
) -> MeasuredRates:
    """Measure every rate that predictions for these models and workloads need.

    Args:
        device: a torch device.
        models: the candidates, the original model first.
        works: the workloads, one for each dtype.
        others: models and workloads of bench records.
        listener: for progress.
    """
    started = time.perf_counter()
    groups = sorted(
        {
            (layer.num_attention_heads // layer.num_key_value_heads, layer.head_dim)
            for model in models
            for layer in model.attention
        }
    )
    # The smallest and the largest number of rows bound the rates in between.
    groups = list(dict.fromkeys((groups[0], groups[-1])))
    dtypes = list(dict.fromkeys(work.dtype for work in (*works, *(work for _, work in others))))
    wanted = {(work.dtype, rows, models[0].hidden): None for work in works for rows in (work.batch, _PROMPT_ROWS)}
    wanted |= {(work.dtype, work.batch, model.hidden): None for model, work in others}
    wanted |= {(dtype, *group): None for dtype in dtypes for group in groups}
    largest = max(sum(cost.nbytes for cost in step_costs(models[0], work)) for work in works)
    products: dict[tuple[str, int, int], float] = {}
    with (listener or Listener()).stage("measuring this machine", 1 + len(wanted), "rates") as progress:
        progress(0, "reading memory")
        block = min(_MOST_READ, max(_LEAST_READ, largest))
        bandwidth = read_bandwidth(device, nbytes=block).median
        for key in wanted:
            dtype, rows, inner = key
            progress(1, f"{dtype} products of {rows:,} rows, {inner:,} long")
            products[key] = product_rate(rows, inner, dtype=getattr(torch, dtype), device=device).median
        progress(1, "")
    attention = {dtype: max(products[dtype, *group] for group in groups) for dtype in dtypes}
    return MeasuredRates(bandwidth, products, attention, time.perf_counter() - started)


class Machine:
    """The target hardware, of the table or measured.

    Args:
        known: hardware of the table, or None.
        own: rates of this machine, or None.
    """

    def __init__(self, known: Hardware | None, own: MeasuredRates | None) -> None:
        assert (known is None) != (own is None)
        self._known, self._own = known, own

    def rates(self, model: Model, work: Work) -> Rates:
        """Rates for a step of this model."""
        if self._known is not None:
            rate = self._known.rate(work.dtype)
            return Rates(self._known.bandwidth, rate, rate)
        assert self._own is not None
        weights = self._own.products[work.dtype, work.batch, model.hidden]
        return Rates(self._own.bandwidth, weights, self._own.attention[work.dtype])

    def bandwidth(self) -> float:
        """Bytes per second."""
        return (self._known or self._own).bandwidth  # type: ignore[union-attr]

    def prompt_rate(self, model: Model, dtype: str) -> float:
        """Operations per second of products with many rows."""
        if self._known is not None:
            return self._known.rate(dtype)
        assert self._own is not None
        return self._own.products[dtype, _PROMPT_ROWS, model.hidden]

    def source(self) -> str:
        """The source of the rates, as one line."""
        if self._known is not None:
            known = self._known
            return f"{known.name}: {known.bandwidth / 1e9:,.0f} GB/s, according to its manufacturer ({known.source})"
        assert self._own is not None
        return (
            f"this machine: {self.bandwidth() / 1e9:.1f} GB/s of reads, measured now, with "
            f"{len(self._own.products)} rates of products, in {self._own.seconds:.0f} s, for all candidates"
        )

    def describe(self) -> dict[str, Any]:
        """For the record."""
        if self._known is not None:
            return {"name": self._known.name, "bandwidth_bytes_per_second": self._known.bandwidth}
        assert self._own is not None
        return self._own.to_json()


def fastest_dtype(machine: Machine, model: Model, works: Sequence[Work]) -> tuple[Work, str]:
    """The dtype in which a step of a model is fastest, and the reason as one line.

    Args:
        machine: measured.
        model: the original model.
        works: the same workload in several dtypes; of equal times, the first is chosen.
    """
    seconds = [step_seconds(*step_costs(model, work), machine.rates(model, work), Efficiency()) for work in works]
    best = min(range(len(works)), key=lambda number: seconds[number])
    slower = ", ".join(
        f"{1e3 * took:.3g} ms in {work.dtype}"
        for number, (took, work) in enumerate(zip(seconds, works, strict=True))
        if number != best
    )
    chosen = works[best]
    why = f"dtype {chosen.dtype}, chosen because a step of the original model takes at least "
    why += f"{1e3 * seconds[best]:.3g} ms in it here, compared with {slower}"
    if chosen.dtype == "float32" and chosen.device == "cpu" and not _multiplies_bfloat16():
        why += " (bfloat16 products are emulated: this processor has no AVX512-BF16 or AMX)"
    return chosen, why + "; --dtype sets another"


def _multiplies_bfloat16() -> bool:
    """Whether an x86 processor has bfloat16 products; True if unknown."""
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    known = [check() for check in checks if check is not None]
    return any(known) or not known or platform.machine() not in ("x86_64", "AMD64")


@dataclass(frozen=True)
class Bench:
    """A record of ``regroup bench decode``.

    Attributes:
        path: the file.
        work: the workload.
        models: each with its measured seconds per token.
        place: the accelerator or processor of the measurement, as the record names it.
    """

    path: Path
    work: Work
    models: tuple[tuple[Model, float], ...]
    place: str

    @classmethod
    def load(cls, path: Path, *, processor: bool | None = None) -> Bench:
        """Read a record.

        Args:
            path: the file.
            processor: whether it must be of a processor (True) or an accelerator (False).

        Raises:
            RegroupError: it is not a record of ``bench decode``, has another format, or is of the other kind of device.
        """
        value = read_json(path)
        if value.get("kind") != "benchmark/decode" or value.get("format") != 1:
            raise RegroupError(
                "this is not a record of decoding",
                file=path,
                expected="a record that `regroup bench decode -o` wrote, format 1",
                got=f"{value.get('kind')}, format {value.get('format')}",
            )
        try:
            done, results = value["configuration"], value["results"]
            if processor is not None and (done["device"] == "cpu") != processor:
                raise RegroupError(
                    "the record was measured on other hardware",
                    file=path,
                    expected="a processor" if processor else "an accelerator, like the target",
                    got=f"{done['device']}",
                    remedy="run `regroup bench decode` on that hardware, or omit the record",
                )
            sizes = [done[name] for name in ("batch", "prompt", "new")]
            if not all(type(size) is int and size < 2**40 for size in sizes):
                raise TypeError(f"batch, prompt and new are {str(sizes)[:80]}")
            work = Work(done["batch"], done["prompt"], done["new"], done["dtype"], "cpu")
            models = []
            for found in results["models"]:
                path_name = "regroup" if "regroup" in found else "transformers"
                model = describe(done["config"], kv_heads=found["kv_heads"], layers=found["layers"])
                took = found[path_name]["token_ms"]["p50"] / 1e3
                if not 0 < took < math.inf:
                    raise ValueError(f"a token took {1e3 * took} ms")
                models.append((model, took))
            if not models:
                raise ValueError("no model")
            machine = value.get("machine", {})
            place = str(machine.get("processor" if done["device"] == "cpu" else "accelerator", "not named"))
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise RegroupError(
                "the record of decoding is incomplete", file=path, got=f"{type(error).__name__}: {error}"
            ) from error
        return cls(path, work, tuple(models), place)

    def in_setting(self, model: Model, work: Work) -> list[tuple[Model, float]]:
        """Measurements of a model, with any KV heads, in this setting; the context may differ by an eighth."""
        if (work.batch, work.dtype) != (self.work.batch, self.work.dtype):
            return []
        if model.is_encoder_decoder and work.prompt != self.work.prompt:
            return []
        asked = middle_context(model, work)
        if abs(middle_context(model, self.work) - asked) > asked / 8:
            return []
        return [(other, seconds) for other, seconds in self.models if _frame(other) == _frame(model)]


def _frame(model: Model) -> tuple[Any, ...]:
    """The properties that two models share if only their KV heads differ."""
    heads = [(layer.kind, layer.num_attention_heads, layer.head_dim, layer.window) for layer in model.attention]
    return model.layers, model.hidden, model.intermediate, model.vocabulary, model.is_encoder_decoder, heads


def interpolated(estimate: float, known: Sequence[tuple[float, float]]) -> float:
    """Seconds of a step from measurements with other KV heads in the same setting.

    Equal estimates give equal times, so that measured and unmeasured candidates are consistent.

    Args:
        estimate: estimated seconds.
        known: pairs of the estimated and the measured seconds; at least one.

    Returns:
        Linear interpolation; outside the range, proportional to the nearest measurement.
    """
    ordered = sorted(dict(reversed(known)).items())  # of several with equal estimates, the first
    below = [pair for pair in ordered if pair[0] <= estimate]
    above = [pair for pair in ordered if pair[0] >= estimate]
    if not below or not above:
        nearest, took = (below[-1:] or above[:1])[0]
        return took * estimate / nearest
    (low, first), (high, second) = below[-1], above[0]
    return first if high == low else first + (second - first) * (estimate - low) / (high - low)


def efficiency_of(records: Sequence[Bench], machine: Machine, batch: int) -> Efficiency:
    """The efficiency of steps at a batch size, from the records' steps at the same or other batch sizes."""
    found: dict[int, tuple[list[tuple[float, float]], list[float]]] = {}
    for bench in records:
        floors, seconds = found.setdefault(bench.work.batch, ([], []))
        for model, took in bench.models:
            floors.append(step_floors(*step_costs(model, bench.work), machine.rates(model, bench.work)))
            seconds.append(took)
    return between({size: fit(*measured) for size, measured in found.items()}, batch)
