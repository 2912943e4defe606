"""Write the weight files of a converted model: a few threads share one queue of pieces.

Byte ranges that do not change, or that were solved before, are copied inside the kernel; tensors that are pooled are
read, merged and written one at a time. Reading, merging and writing overlap so, for one large file too.
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
from ..solver.rewrite import Change
from .changes import StoredTensor

# One piece of copied data: long enough for disk speed, short enough to stop and to share among workers.
_PIECE = 64 << 20
# Files that are written at a time: the next one's pieces keep the workers busy while one is finished.
_OPEN_FILES = 2


class Spec(NamedTuple):
    """What a tensor is: a safetensors dtype name and a shape."""

    dtype: str
    shape: tuple[int, ...]


# File name to tensor name to what is written there, in the order of the data.
Shards = Mapping[str, Mapping[str, Spec]]


class ShardWriter:
    """Writes the weight files that a killed run did not finish.

    Args:
        checkpoint: where tensors that do not change are copied from, byte for byte.
        shards: what to write, in the order of the data.
        changed: how to make every tensor that changes.
        stage: the folder to write into.
        finished: files that are there already.
        done: called with each file that is complete and flushed.
        workers: threads.
        progress: called from any thread with the number of bytes just written, or found written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        shards: Shards,
        changed: Mapping[str, Change | StoredTensor],
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
        self.files: list[ShardFile] = []
        self.open: deque[tuple[str, ShardFile, list[Future[None]]]] = deque()
        self.syncs: list[Future[None]] = []

    def run(self) -> None:
        """Write, flush and note every file that is not finished."""
        try:
            for name, tensors in self.shards.items():
                if name in self.finished:
                    self.progress(sum(nbytes_of(*spec) for spec in tensors.values()))
                    continue
                if len(self.open) == _OPEN_FILES:
                    self._finish_next()
                target = ShardFile(self.stage / name, self.shards[name], self.checkpoint.metadata[name])
                self.files.append(target)
                work = [self.executor.submit(self._piece, *piece) for piece in self._pieces(name, target)]
                self.open.append((name, target, work))
            while self.open:
                self._finish_next()
            _finish(self.syncs)
        finally:
            self.executor.shutdown(wait=True, cancel_futures=True)
            for target in self.files:
                target.close(sync=False)

    def _finish_next(self) -> None:
        name, target, work = self.open.popleft()
        _finish([*work, *(sync for sync in self.syncs if sync.done())])
        # The disk works on this file while the next one is being made.
        self.syncs.append(self.executor.submit(self._complete, name, target))

    def _complete(self, name: str, target: ShardFile) -> None:
        target.close()
        self.checkpoint.check_unchanged(name)
        self.done(name)

    def _piece(self, nbytes: int, action: Callable[[], None]) -> None:
        action()
        self.progress(nbytes)

    def _pieces(self, file: str, target: ShardFile) -> Iterator[tuple[int, Callable[[], None]]]:
        """The work of one file: (bytes written, what writes them)."""
        entries, path = self.checkpoint.shards[file], self.checkpoint.folder / file
        copies: list[list[Any]] = []
        for name in self.shards[file]:
            start, end = target.ranges[name]
            change = self.changed.get(name)
            if change is None:
                source, first, last = path, entries[name].start, entries[name].end
            elif isinstance(change, StoredTensor):
                source, first, last = change.path, change.start, change.end
            else:
                yield end - start, lambda name=name, how=change: target.write(name, how.run(name, self.checkpoint.read))
                continue
            # Neighbours in both files are one copy.
            before = copies[-1] if copies else None
            if before and before[0] == source and before[2] == first and before[3] + before[2] - before[1] == start:
                before[2] = last
            else:
                copies.append([source, first, last, start])
        for source, first, last, to in copies:
            for begin in range(first, last, _PIECE):
                end = min(begin + _PIECE, last)
                yield (
                    end - begin,
                    lambda source=source, begin=begin, end=end, to=to + begin - first: target.copy(
                        source, begin, end, to
                    ),
                )


def _finish(futures: list[Future[None]]) -> None:
    # One at a time: a wait for all of them would hold a Ctrl-C back until the queue is empty.
    for future in futures:
        wait([future])
        future.result()


def converted_index(index: Mapping[str, Any], shards: Shards) -> dict[str, Any]:
    """The original index with the sizes and places of what was written."""
    old = index.get("metadata")
    metadata = dict(old) if isinstance(old, dict) else {}
    metadata["total_size"] = sum(nbytes_of(*spec) for names in shards.values() for spec in names.values())
    if "total_parameters" in metadata:
        counts = (math.prod(shape) for names in shards.values() for _, shape in names.values())
        metadata["total_parameters"] = sum(counts)
    weight_map = {name: file for file, names in shards.items() for name in names}
    return {**index, "metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
