"""Measured memory bandwidth and matrix product rates of this machine, the limits that results are compared with."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..attention.cpu.linear_layers import fast_layer

# Much larger than every cache, and small compared with the benchmarked models.
_READ_BYTES = 512 << 20
# Sizes of the matrix in several simultaneous products, whose operands stay in the caches. With many rows reading is
# not the limit, and a large matrix hides the time to start threads.
_CACHED_BYTES = (128 << 10, 512 << 10, 4 << 20)
_PRODUCTS = 8
# A product of more rows is not faster: arithmetic is the limit long before. Unlimited rows would not fit into memory.
_MOST_ROWS = 1024
_SECONDS = 0.1
# Time limit of measuring a product: an emulated dtype can be a thousand times slower.
_MOST_SECONDS = 3.0


@dataclass(frozen=True)
class Probe:
    """A piece of work of known size, to be timed in turns with other work.

    Attributes:
        way: its name.
        action: the function to time.
        work: bytes or operations per call.
        repeats: calls per run, so that a run is long enough for the clock.
        device: its device.
    """

    way: str
    action: Callable[[], object]
    work: int
    repeats: int
    device: torch.device

    def run(self) -> float:
        """Bytes or operations per second of one run of some milliseconds."""

        def runs() -> None:
            for _ in range(self.repeats):
                self.action()

        with torch.inference_mode():
            return self.repeats * self.work / timed(runs, self.device)


@dataclass(frozen=True)
class Rate:
    """A measured rate, and its probe.

    Attributes:
        best, median: of all runs of the fastest way; bytes or operations per second.
        probe: the fastest way, to measure again.
    """

    best: float
    median: float
    probe: Probe

    def again(self, runs: int = 9) -> float:
        """The median of further runs: virtual machines share memory bandwidth, and rates change within minutes."""
        return statistics.median(self.probe.run() for _ in range(runs))


def read_bandwidth(device: torch.device | str = "cpu", *, nbytes: int | None = None) -> Rate:
    """Bytes per second that all threads together read from memory.

    Args:
        device: the device with the memory.
        nbytes: size of the block that is read, which must exceed the caches; 512 MiB by default.

    Returns:
        The best of several ways to read a block once (sums of rows, as float32 and float64, and a maximum). On a GPU
        also a copy, whose bytes read and written both count. The probe keeps the block.
    """
    device = torch.device(device)
    nbytes = _READ_BYTES if nbytes is None else nbytes
    count = 16 * max(1, torch.get_num_threads())
    # Whole rows of both dtypes, for any number of threads.
    nbytes = max(1, nbytes // (8 * count)) * 8 * count
    block = torch.ones(nbytes // 4, device=device)
    rows = block.view(count, -1)
    wide = rows.view(torch.float64)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "sum of float32, by row": (lambda: rows.sum(1), nbytes),
        "sum of float64, by row": (lambda: wide.sum(1), nbytes),
        "maximum, by row": (lambda: rows.amax(1), nbytes),
    }
    if device.type != "cpu":
        half = block[: block.numel() // 2]
        target = torch.empty_like(half)
        ways["copy"] = (lambda: target.copy_(half), 2 * half.nbytes)
    return _best(ways, device)


def product_rate(
    rows: int,
    inner: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Rate:
    """Floating-point operations per second of matrix products of ``rows`` rows, with operands in a cache.

    The products are those of decoding: (rows, inner) queries or hidden states with a (columns, inner) matrix of keys or
    weights, or its transpose, several at once. ``rows`` is H / G in attention and the batch size in linear layers. On a
    GPU operands are large, because it has no such caches.

    Returns:
        The best of several forms of the product, including regroup's linear layers; for more rows than 1,024, of 1,024.
        It takes some seconds however slow the machine is in this dtype: then larger products are omitted, and the
        smallest is made smaller.
    """
    device, rows = torch.device(device), min(rows, _MOST_ROWS)
    size = torch.empty((), dtype=dtype).element_size()
    ways: dict[str, tuple[Callable[[], object], int]] = {}
    most = _affordable(rows, inner, dtype, device)
    for cached in _CACHED_BYTES if device.type == "cpu" else (64 << 20,):
        columns, products = max(16, cached // (inner * size)), _PRODUCTS
        if 2 * products * rows * inner * columns > most:
            if ways:
                break
            products = 1
            columns = min(columns, max(16, int(most) // (2 * rows * inner)))
        flops = 2 * products * rows * inner * columns
        left, matrix, weights = (
            torch.full((products, *sizes), 0.5, dtype=dtype, device=device)
            for sizes in ((rows, inner), (columns, inner), (rows, columns))
        )
        turned = matrix.transpose(1, 2).contiguous()
        forms = {
            "rows × matrix transposed": (left, matrix.transpose(1, 2)),
            "rows × matrix": (left, turned),
            "matrix × rows": (matrix, left.transpose(1, 2)),
            "sum of rows": (weights, matrix),
        }
        for name, operands in forms.items():
            ways[f"{name}, {columns} columns"] = (functools.partial(torch.bmm, *operands), flops)
        if device.type == "cpu" and (layer := fast_layer(dtype)[0]) is not None:
            fast = layer(matrix.flatten(0, 1), None)
            ways[f"{layer.__name__}, {columns} columns"] = (functools.partial(fast, left[0]), flops)
    return _best(ways, device)


def _affordable(rows: int, inner: int, dtype: torch.dtype, device: torch.device) -> float:
    """Operations of a product that can be repeated some hundred times, estimated from one small product."""
    columns = 16
    left, matrix = (torch.full(sizes, 0.5, dtype=dtype, device=device) for sizes in ((rows, inner), (inner, columns)))

    def once() -> float:
        return timed(lambda: torch.mm(left, matrix), device)

    with torch.inference_mode():
        took = once()
        # The first call includes initialisation, but if it is slow there is no time for another.
        took = min(took, once()) if took < _MOST_SECONDS / 10 else took
    return 2 * rows * inner * columns / max(took, 1e-7) * _MOST_SECONDS / 60


class OtherProcesses:
    """How much other processes use the processors while a block runs, which disturbs timings.

    Attributes:
        share: the processor time of other processes, divided by that of all processors; None if the system does not
            say. Known after the block.
    """

    share: float | None = None

    def __enter__(self) -> OtherProcesses:
        self._start = _processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        end = _processor_seconds()
        if self._start is not None and end is not None and end[0] > self._start[0]:
            whole, busy, own = (after - before for after, before in zip(end, self._start, strict=True))
            self.share = max(0.0, (busy - own) / whole)


def _processor_seconds() -> tuple[float, float, float] | None:
    """Seconds of all processors since the start: total, busy, and of this process."""
    try:
        with Path("/proc/stat").open(encoding="ascii") as file:
            ticks = [int(value) for value in file.readline().split()[1:9]]
    except (OSError, ValueError):
        return None
    whole, idle = sum(ticks), ticks[3] + ticks[4]
    own = os.times()
    hertz = os.sysconf("SC_CLK_TCK")
    return whole / hertz, (whole - idle) / hertz, own.user + own.system + own.children_user + own.children_system


def synchronize(device: torch.device) -> None:
    """Wait for the work that was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def quantiles(values: list[float]) -> dict[str, float]:
    """The 20, 50 and 80% quantiles, by linear interpolation, of at least one value."""
    ordered = torch.tensor(values, dtype=torch.float64)
    names = ("p20", "p50", "p80")
    return dict(zip(names, torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8]).double()).tolist(), strict=True))


@torch.inference_mode()
def _best(ways: dict[str, tuple[Callable[[], object], int]], device: torch.device) -> Rate:
    """Time the ways in turns, and return the one with the fastest run."""
    probes = []
    last = time.perf_counter() + _MOST_SECONDS
    for name, (action, work) in ways.items():
        if probes and time.perf_counter() > last:
            break
        once = timed(action, device)
        if once < _SECONDS:
            once = min(once, timed(action, device), timed(action, device))
        # A run is long enough for the clock, and short enough that some runs are not interrupted.
        probes.append(Probe(name, action, work, max(1, round(0.004 / max(once, 1e-7))), device))
    rates: list[list[float]] = [[] for _ in probes]
    end = time.perf_counter() + _SECONDS * len(ways)
    while not rates[0] or time.perf_counter() < min(end, last) or (len(rates[0]) < 3 and time.perf_counter() < last):
        for found, probe in zip(rates, probes, strict=True):
            if not found or time.perf_counter() < last:
                found.append(probe.run())
    winner = max(range(len(probes)), key=lambda index: max(rates[index]))
    return Rate(max(rates[winner]), statistics.median(rates[winner]), probes[winner])
