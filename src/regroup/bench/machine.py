"""How fast this machine reads memory and multiplies matrices, measured: the roofs that results are held against."""

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

# Far above every cache, and little beside what is benchmarked.
_READ_BYTES = 512 << 20
# Products are a few at once, and their operands stay in the caches: the matrix has one of these sizes. With many rows
# reading does not bind, and a large matrix shows what starting the threads hides in a small one.
_CACHED_BYTES = (128 << 10, 512 << 10, 4 << 20)
_PRODUCTS = 8
# A product of more rows is no faster: arithmetic binds long before. As many as somebody asks about fit in no memory.
_MOST_ROWS = 1024
_SECONDS = 0.1
# A product's rate is known after so many seconds even where a dtype is emulated, which can be a thousand times slower.
_MOST_SECONDS = 3.0


@dataclass(frozen=True)
class Probe:
    """A piece of work of known size, to be timed in turns with what it is compared with.

    Attributes:
        way: what it does.
        action: does it.
        work: bytes or operations of it.
        repeats: how often a run does it, so that it is long enough for the clock.
        device: where.
    """

    way: str
    action: Callable[[], object]
    work: int
    repeats: int
    device: torch.device

    def run(self) -> float:
        """Bytes or operations a second, of one run of some milliseconds."""

        def runs() -> None:
            for _ in range(self.repeats):
                self.action()

        with torch.inference_mode():
            return self.repeats * self.work / timed(runs, self.device)


@dataclass(frozen=True)
class Rate:
    """A measured rate, and what measured it.

    Attributes:
        best, median: of all runs of the way that was best; bytes or operations a second.
        probe: that way, to measure again.
    """

    best: float
    median: float
    probe: Probe

    def again(self, runs: int = 9) -> float:
        """The median of some more runs: memory is shared with other machines, and rates change within minutes."""
        return statistics.median(self.probe.run() for _ in range(runs))


def read_bandwidth(device: torch.device | str = "cpu", *, nbytes: int | None = None) -> Rate:
    """Bytes a second that all threads together read from memory.

    Args:
        device: whose memory.
        nbytes: of the block that is read, which must not fit into a cache; 512 MiB by default.

    Returns:
        The best of several ways to read a block once (sums by row, of numbers of two widths, and a maximum). A GPU is
        also asked to copy: bytes read and written count then. Its probe keeps the block.
    """
    device = torch.device(device)
    nbytes = _READ_BYTES if nbytes is None else nbytes
    count = 16 * max(1, torch.get_num_threads())
    # Whole rows of numbers of either width, whatever the number of threads.
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
    """Floating-point operations a second of matrix products of ``rows`` rows, with operands that lie in a cache.

    The product is that of decoding: (rows, inner) queries or hidden states with a (columns, inner) matrix of keys or
    weights, or its transpose, several such products at once. ``rows`` is H / G in attention and the batch in linear
    layers. On a GPU operands are large, for it has no such caches.

    Returns:
        The best of several forms of the product, our fast linear layers among them; of more than 1,024 rows it is that
        of 1,024. It is known after some seconds
        however slow the machine is in this dtype: larger products are left out there, and the smallest made smaller.
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
    """Operations of a product that may be repeated some hundred times: from one small product of the same form."""
    columns = 16
    left, matrix = (torch.full(sizes, 0.5, dtype=dtype, device=device) for sizes in ((rows, inner), (inner, columns)))

    def once() -> float:
        return timed(lambda: torch.mm(left, matrix), device)

    with torch.inference_mode():
        took = once()
        # The first call also prepares things; where it was slow there is no time to see how much of it that was.
        took = min(took, once()) if took < _MOST_SECONDS / 10 else took
    return 2 * rows * inner * columns / max(took, 1e-7) * _MOST_SECONDS / 60


class Bystanders:
    """How busy other processes keep the processors while a block runs; they spoil timings of work on all threads.

    Attributes:
        share: processors' worth of time that others took, over the processors' number; None where the system does
            not say. Known after the block.
    """

    share: float | None = None

    def __enter__(self) -> Bystanders:
        self._start = _processor_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        end = _processor_seconds()
        if self._start is not None and end is not None and end[0] > self._start[0]:
            whole, busy, own = (after - before for after, before in zip(end, self._start, strict=True))
            self.share = max(0.0, (busy - own) / whole)


def _processor_seconds() -> tuple[float, float, float] | None:
    """Of all processors since the start: seconds in all, seconds at work, and those of this process."""
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
    """Wait for what was started on a device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(action: Callable[[], object], device: torch.device) -> float:
    """Seconds that an action takes, to its end on the device."""
    synchronize(device)
    start = time.perf_counter()
    action()
    synchronize(device)
    return time.perf_counter() - start


def quantiles(values: list[float]) -> dict[str, float]:
    """The 20, 50 and 80% quantiles, by linear interpolation, of one value or more."""
    ordered = torch.tensor(values, dtype=torch.float64)
    names = ("p20", "p50", "p80")
    return dict(zip(names, torch.quantile(ordered, torch.tensor([0.2, 0.5, 0.8]).double()).tolist(), strict=True))


@torch.inference_mode()
def _best(ways: dict[str, tuple[Callable[[], object], int]], device: torch.device) -> Rate:
    """Alternate the ways for a while, and keep the one that was fastest once."""
    probes = []
    last = time.perf_counter() + _MOST_SECONDS
    for name, (action, work) in ways.items():
        if probes and time.perf_counter() > last:
            break
        once = timed(action, device)
        if once < _SECONDS:
            once = min(once, timed(action, device), timed(action, device))
        # A run is long enough for the clock, and short enough to be left alone by the system now and then.
        probes.append(Probe(name, action, work, max(1, round(0.004 / max(once, 1e-7))), device))
    rates: list[list[float]] = [[] for _ in probes]
    end = time.perf_counter() + _SECONDS * len(ways)
    while not rates[0] or time.perf_counter() < min(end, last) or (len(rates[0]) < 3 and time.perf_counter() < last):
        for found, probe in zip(rates, probes, strict=True):
            if not found or time.perf_counter() < last:
                found.append(probe.run())
    winner = max(range(len(probes)), key=lambda index: max(rates[index]))
    return Rate(max(rates[winner]), statistics.median(rates[winner]), probes[winner])
