"""Rates of the hardware that is asked about, and what bench records say of how near their floors steps come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..bench.build import Model, describe
from ..bench.machine import product_rate
from ..bench.work import Roofs, Work, step_costs
from ..checkpoint.reader import read_json
from ..errors import RegroupError
from .hardware import Hardware
from .predict import Efficiency, Rates, between, fit, step_floors

_PROMPT_ROWS = 512


class Machine:
    """The hardware: of the table, or this one, measured as far as it is asked for.

    Args:
        known: of the table, or None.
        roofs: of this machine, or None.
    """

    def __init__(self, known: Hardware | None, roofs: Roofs | None) -> None:
        assert (known is None) != (roofs is None)
        self._known, self._roofs = known, roofs

    def rates(self, model: Model, work: Work) -> Rates:
        """Of a step of this model."""
        if self._known is not None:
            rate = self._known.rate(work.dtype)
            return Rates(self._known.bandwidth, rate, rate)
        assert self._roofs is not None
        ceiling = self._roofs.for_work(work).ceiling(model)
        return Rates(ceiling.bandwidth, ceiling.weights_rate, ceiling.attention_rate)

    def bandwidth(self) -> float:
        """Bytes a second."""
        if self._known is not None:
            return self._known.bandwidth
        assert self._roofs is not None
        return self._roofs.bandwidth.median

    def prompt_rate(self, model: Model, dtype: str) -> float:
        """Operations a second of products with many rows."""
        if self._known is not None:
            return self._known.rate(dtype)
        assert self._roofs is not None
        device = self._roofs.work.device
        return product_rate(_PROMPT_ROWS, model.hidden, dtype=getattr(torch, dtype), device=device).median

    def source(self) -> str:
        """Where the rates are from, in a line."""
        if self._known is not None:
            known = self._known
            return f"{known.name}: {known.bandwidth / 1e9:,.0f} GB/s, as its maker states ({known.source})"
        return f"this machine: {self.bandwidth() / 1e9:.1f} GB/s of reads, measured just now"

    def describe(self, model: Model) -> dict[str, Any]:
        """For the record."""
        if self._known is not None:
            return {"name": self._known.name, "bandwidth_bytes_per_second": self._known.bandwidth}
        assert self._roofs is not None
        return self._roofs.to_json()


@dataclass(frozen=True)
class Bench:
    """A record of ``regroup bench decode``.

    Attributes:
        path: of the file.
        work: what was decoded.
        models: each with its measured seconds a token.
    """

    path: Path
    work: Work
    models: tuple[tuple[Model, float], ...]

    @classmethod
    def load(cls, path: Path, *, processor: bool | None = None) -> Bench:
        """Read a record.

        Args:
            path: of the file.
            processor: whether it has to be of a processor (True) or of an accelerator (False).

        Raises:
            RegroupError: it is none of ``bench decode``, of another format, or of a device of the other kind.
        """
        value = read_json(path)
        if value.get("kind") != "benchmark/decode" or value.get("format") != 1:
            raise RegroupError(
                "this is no record of decoding",
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
                    expected="a processor" if processor else "an accelerator, as the one that is asked about",
                    got=f"{done['device']}",
                    remedy="run `regroup bench decode` on that hardware, or leave the record out",
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
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise RegroupError(
                "the record of decoding lacks something", file=path, got=f"{type(error).__name__}: {error}"
            ) from error
        return cls(path, work, tuple(models))

    def seconds_of(self, model: Model, work: Work) -> float | None:
        """What was measured of just this, if it was."""
        if (work.batch, work.prompt, work.dtype) != (self.work.batch, self.work.prompt, self.work.dtype):
            return None
        for other, seconds in self.models:
            same = other.parameters == model.parameters and other.layers == model.layers
            if same and [x.num_key_value_heads for x in other.attention] == [
                x.num_key_value_heads for x in model.attention
            ]:
                return seconds
        return None


def efficiency_of(records: Sequence[Bench], machine: Machine, batch: int) -> Efficiency:
    """How near their floors steps of a batch come, by the records' steps of the same batch or of others."""
    found: dict[int, tuple[list[tuple[float, float]], list[float]]] = {}
    for bench in records:
        floors, seconds = found.setdefault(bench.work.batch, ([], []))
        for model, took in bench.models:
            floors.append(step_floors(*step_costs(model, bench.work), machine.rates(model, bench.work)))
            seconds.append(took)
    return between({size: fit(*measured) for size, measured in found.items()}, batch)
