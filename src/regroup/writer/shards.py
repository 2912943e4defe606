"""Write the weight files of a child: a few threads share one queue of pieces.

Untouched byte ranges are copied inside the kernel; tensors that change are read, merged and written one at a time.
Reading, merging and writing overlap so, for one large file too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

from ..checkpoint import Checkpoint, ShardFile
from ..checkpoint.header import nbytes_of
from .rewrite import Change, Solved, Solver

# One piece of untouched data: long enough for disk speed, short enough to stop and to share among workers.
_PIECE = 64 << 20
# Files at work: the next one's pieces keep the workers busy while one is finished.
_FLYING = 2


class Spec(NamedTuple):
    """What a tensor is: a safetensors dtype name and a shape."""

    dtype: str
    shape: tuple[int, ...]


# File name to tensor name to what is written there, in the order of the data.
Shards = Mapping[str, Mapping[str, Spec]]


class ShardWriter:
    """Writes the weight files that a killed run did not finish.

    A layer that is solved as a whole may lie in several files, and two runs need not round alike, nor choose the same
    basis: where one of its files is finished and another is not, its tensors in the finished one are written again.

    Args:
        checkpoint: where tensors that do not change are copied from, byte for byte.
        shards: what to write, in the order of the data.
        changed: how to make every tensor that changes.
        stage: the folder to write into.
        finished: files that are there already.
        done: told of each file that is complete and flushed.
        workers: threads.
        progress: called from any thread with the number of bytes just written, or found written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shards: Shards,
        changed: Mapping[str, Change],
        stage: Path,
        *,
        finished: Iterable[str] = (),
        done: Callable[[str], None] | None = None,
        workers: int = 2,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.checkpoint, self.shards, self.changed, self.stage = checkpoint, shards, changed, stage
        self.done, self.progress = done or (lambda file: None), progress or (lambda count: None)
        self.finished = tuple(finished)
        self.executor = ThreadPoolExecutor(max_workers=workers)
        self.straddling = self._straddling()
        self.files: list[ShardFile] = []
        self.reopened: dict[str, ShardFile] = {}
        self.flying: deque[tuple[str, ShardFile, list[Future[None]]]] = deque()
        self.syncs: list[Future[None]] = []

    def run(self) -> None:
        """Write, flush and note every file that is not finished."""
        try:
            for name in {name for places in self.straddling.values() for name, _ in places}:
                self.reopened[name] = self._file(name, again=True)
            for name, tensors in self.shards.items():
                if name in self.finished:
                    self.progress(sum(nbytes_of(*spec) for spec in tensors.values()))
                    continue
                if len(self.flying) == _FLYING:
                    self._next_lands()
                target = self._file(name)
                work = [self.executor.submit(self._piece, *piece) for piece in self._pieces(name, target)]
                self.flying.append((name, target, work))
            while self.flying:
                self._next_lands()
            _finish(self.syncs)
        finally:
            self.executor.shutdown(wait=True, cancel_futures=True)
            for target in self.files:
                target.close(sync=False)

    def _file(self, name: str, *, again: bool = False) -> ShardFile:
        file = ShardFile(self.stage / name, self.shards[name], self.checkpoint.metadata[name], again=again)
        self.files.append(file)
        return file

    def _next_lands(self) -> None:
        name, target, work = self.flying.popleft()
        _finish([*work, *(sync for sync in self.syncs if sync.done())])
        # The disk works on this file while the next one is being made.
        self.syncs.append(self.executor.submit(self._land, name, target))

    def _land(self, name: str, target: ShardFile) -> None:
        for file in self.reopened.values():
            file.sync()
        target.close()
        self.checkpoint.check_unchanged(name)
        self.done(name)

    def _piece(self, nbytes: int, action: Callable[[], None]) -> None:
        action()
        self.progress(nbytes)

    def _pieces(self, file: str, target: ShardFile) -> Iterator[tuple[int, Callable[[], None]]]:
        """The work of one file: (bytes written, what writes them)."""
        entries, path = self.checkpoint.shards[file], self.checkpoint.folder / file

        def rewrite(name: str, target: ShardFile) -> Callable[[], None]:
            return lambda: target.write(name, self.changed[name].run(name, self.checkpoint.read))

        def copy(start: int, end: int, to: int) -> Callable[[], None]:
            return lambda: target.copy(path, start, end, to)

        runs: list[list[int]] = []
        for name in self.shards[file]:
            start, end = target.ranges[name]
            change = self.changed.get(name)
            if change is not None:
                if isinstance(change, Solved):
                    for finished, tensor in self.straddling.pop(change.solver, ()):
                        yield 0, rewrite(tensor, self.reopened[finished])
                yield end - start, rewrite(name, target)
                continue
            entry = entries[name]
            # Neighbours in both files are one run.
            if runs and runs[-1][1] == entry.start and runs[-1][2] + runs[-1][1] - runs[-1][0] == start:
                runs[-1][1] = entry.end
            else:
                runs.append([entry.start, entry.end, start])
        for first, last, to in runs:
            for begin in range(first, last, _PIECE):
                end = min(begin + _PIECE, last)
                yield end - begin, copy(begin, end, to + begin - first)

    def _straddling(self) -> dict[Solver, list[tuple[str, str]]]:
        """Solvers with tensors in finished and in unfinished files: the (file, tensor) of those in finished ones."""
        places: dict[Solver, list[tuple[str, str]]] = {}
        for file, names in self.shards.items():
            for name in names:
                change = self.changed.get(name)
                if isinstance(change, Solved):
                    places.setdefault(change.solver, []).append((file, name))
        split = {solver: [place for place in found if place[0] in self.finished] for solver, found in places.items()}
        return {solver: done for solver, done in split.items() if 0 < len(done) < len(places[solver])}


def _finish(futures: list[Future[None]]) -> None:
    # One at a time: a wait for all of them would hold a Ctrl-C back until the queue is empty.
    for future in futures:
        wait([future])
        future.result()


def child_index(index: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """A parent's index with the sizes and places of what was written."""
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = sum(nbytes_of(*spec) for names in shards.values() for spec in names.values())
    if "total_parameters" in metadata:
        counts = (math.prod(shape) for names in shards.values() for _, shape in names.values())
        metadata["total_parameters"] = sum(counts)
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
