"""How long a conversion will take and what disk it needs: from headers, and from a moment's work on the same disks."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint import Checkpoint
from ..checkpoint.header import nbytes_of
from ..checkpoint.writer import COPY_BYTES, copy_range, existing_parent
from ..errors import RegroupError
from ..solver.rewrite import Change
from .changes import SolvedTensor
from .preview import Prepared

# A disk's own cache takes the first tens of megabytes at a speed that it does not keep.
_PROBE_BYTES = 256 << 20
_PROBE_SECONDS = 2.0


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take.

    Attributes:
        folder: where there are ``bytes_free`` bytes; those of a killed run to the destination not counted.
        bytes_read, bytes_written: of weights and companions, from headers: exact but for config, index and card.
        probed, copy_rate: bytes that were copied to a nameless file on the destination's disk and flushed, and the
            bytes per second of that.
        copy_seconds: to write everything at that rate.
        pool_seconds: to read and pool all tensors that are pooled, if bytes take as long as those of the largest.
        solve_seconds: to solve all layers that are solved from their weights, if each takes as long as the first.
    """

    folder: Path
    bytes_read: int
    bytes_written: int
    bytes_free: int
    probed: int
    copy_rate: float
    copy_seconds: float
    pool_seconds: float
    solve_seconds: float

    @property
    def seconds(self) -> tuple[float, float]:
        """If copying and pooling overlap as far as they can, and if they do not at all; solving comes before."""
        write = max(self.copy_seconds, self.pool_seconds), self.copy_seconds + self.pool_seconds
        return write[0] + self.solve_seconds, write[1] + self.solve_seconds


def estimate(prepared: Prepared, destination: Path) -> Estimate:
    """Estimate a conversion. Nothing has a name on the disk that was not there before, however this ends.

    Raises:
        RegroupError: the source cannot be read, or nothing can be written to the destination's disk.
    """
    checkpoint, changed = prepared.checkpoint, prepared.preview.changed
    folder = existing_parent(destination)
    kept = {name for names in prepared.preview.shards.values() for name in names}
    probed, rate = _copy_rate(checkpoint, folder)
    pooled_or_solved = {
        name: how
        for name, how in changed.items()
        if name in kept and (prepared.plan.calibration is None or not isinstance(how, SolvedTensor))
    }
    pool, solve = _arithmetic_seconds(checkpoint, pooled_or_solved)
    return Estimate(
        folder=folder,
        bytes_read=checkpoint.nbytes + prepared.nbytes - prepared.preview.bytes_after,
        bytes_written=prepared.nbytes,
        bytes_free=shutil.disk_usage(folder).free,
        probed=probed,
        copy_rate=rate,
        copy_seconds=prepared.nbytes / rate,
        pool_seconds=pool,
        solve_seconds=solve,
    )


def _copy_rate(checkpoint: Checkpoint, folder: Path) -> tuple[int, float]:
    """Bytes copied from the largest weight file to the destination's disk, and bytes per second, the flush included."""
    name = max(checkpoint.stamps, key=lambda file: checkpoint.stamps[file][0])
    source, size = checkpoint.folder / name, min(checkpoint.stamps[name][0], _PROBE_BYTES)
    done = 0
    try:
        with tempfile.TemporaryFile(dir=folder) as target:
            _forget(source, size)
            started = time.perf_counter()
            while done < size and time.perf_counter() - started < _PROBE_SECONDS:
                end = min(done + COPY_BYTES, size)
                copy_range(source, done, end, target.fileno(), folder, done)
                done = end
            os.fsync(target.fileno())
            return done, done / (time.perf_counter() - started)
    except OSError as error:
        raise RegroupError(
            "the destination's disk cannot be written to",
            file=folder,
            got=error.strerror or str(error),
            remedy="free some space or choose a destination on another disk",
        ) from error


def _forget(source: Path, size: int) -> None:
    """Ask the system to forget what it has in memory of a file, so that the disk is measured; a request, no more."""
    fd = os.open(source, os.O_RDONLY)
    try:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(fd, 0, size, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def _arithmetic_seconds(checkpoint: Checkpoint, changed: Mapping[str, Change]) -> tuple[float, float]:
    """Seconds to pool tensors, and to solve layers."""
    solved: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for name, change in changed.items():
        if isinstance(change, SolvedTensor):
            solved.setdefault(change.layer, []).append(name)
        else:
            sizes[name] = nbytes_of(change.dtype, change.shape)
    pool = solve = 0.0
    if sizes:
        largest = max(sizes, key=lambda name: sizes[name])
        pool = _timed(checkpoint, changed, [largest]) * sum(sizes.values()) / max(1, sizes[largest])
    if solved:
        solve = _timed(checkpoint, changed, next(iter(solved.values()))) * len(solved)
    return pool, solve


def _timed(checkpoint: Checkpoint, changed: Mapping[str, Change], names: list[str]) -> float:
    started = time.perf_counter()
    for name in names:
        changed[name].run(name, checkpoint.read)
    return time.perf_counter() - started
