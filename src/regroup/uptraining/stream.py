"""Examples in one global order, from sources that are never held in memory, resumable at any batch.

The order depends on data, objective, seed and buffer, and not on the number of processes or workers: every process
reads and tokenises everything, which costs little compared with training, and computes on its share.

A state holds the position of the chunk that is being read, what the chunk before left over, how many examples of the
chunk were taken, and the shuffle buffer. Draws and noise are functions of the seed and the number of the example, so
that no generator's state is needed.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

from torch import Tensor

from ..data.batches import check_vocabulary
from ..data.chunking import Source
from ..data.sources import find_sources
from ..errors import RegroupError
from .examples import Example, Objective, packed, unpacked
from .own_text import AHEAD, Mixture, OwnReader, SampledWindows
from .reader import Cursor, Reader, sides

_REMEMBERED = 16
_FORMAT = 1


@dataclass(frozen=True)
class _Snapshot:
    examples: int
    cursor: Cursor
    buffer: tuple[Example, ...]


class ExampleStream:
    """See ``open_stream``.

    Attributes:
        objective: what makes examples and batches.
        examples: delivered so far in whole global batches, over all processes and epochs.
        epoch: passes over the data that were begun before the present one.
        own: the text that the teacher writes, if any.
        pass_examples: how many examples the first pass had, once it has ended.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: Any,
        objective: Objective,
        *,
        seed: int,
        shuffle_buffer: int,
        vocab_size: int,
        epochs: int | None,
        workers: int,
        own: SampledWindows | None = None,
        limit: int | None = None,
    ) -> None:
        self.objective, self._tokenizer, self._vocab_size = objective, tokenizer, vocab_size
        given = Reader(sources, tokenizer, objective, vocab_size, workers)
        self._reader: Reader | Mixture = given
        if own is not None:
            self._reader = Mixture((OwnReader(own), *([given] if sources else [])), limit)
        elif limit is not None:
            self._reader = Mixture((given,), limit)
        self.own = own
        self.pass_examples: int | None = None
        self._seed = seed
        # A buffer is filled before the first step, and own text should be written as the run goes.
        self._room = max(1, shuffle_buffer if own is None else min(shuffle_buffer, AHEAD))
        self._epochs = epochs
        self._snapshots: deque[_Snapshot] = deque(maxlen=_REMEMBERED)
        self._snapshots.append(_Snapshot(0, Cursor(0, 0, None, {}, 0), ()))

    @property
    def examples(self) -> int:
        return self._snapshots[-1].examples

    @property
    def epoch(self) -> int:
        return self._snapshots[-1].cursor.epoch

    def batches(
        self, batch_size: int, rank: int = 0, world: int = 1, *, micro_batch: int | None = None
    ) -> Iterator[dict[str, Tensor]]:
        """This process's share of each global batch, collated; from where the stream stands.

        Rank r gets examples r, r + world, … of each ``batch_size`` examples of the global order: ``batch_size / world``
        rows, in pieces of ``micro_batch`` rows where that is given. Ends before the first global batch that the data
        cannot fill.

        Raises:
            RegroupError: ``batch_size`` is not a multiple of ``world``, or anything wrong with the data.
        """
        if batch_size % world:
            raise RegroupError(
                "the batch cannot be shared by the processes",
                expected=f"a multiple of {world}, the number of processes",
                got=batch_size,
                remedy="choose another --batch-size",
            )
        return self._batches(batch_size, rank, world, micro_batch or batch_size)

    def _batches(self, batch_size: int, rank: int, world: int, size: int) -> Iterator[dict[str, Tensor]]:
        delivered = self._deliver()
        while True:
            share: list[Example] = []
            for place in range(batch_size):
                found = next(delivered, None)
                if found is None:
                    return
                number, example, snapshot = found
                if place % world == rank:
                    share.append(self._corrupted(number, example))
                if place == batch_size - 1:
                    self._snapshots.append(snapshot())
            for start in range(0, len(share), size):
                yield self.objective.collate(share[start : start + size])

    def state_dict(self, examples: int | None = None) -> dict[str, Any]:
        """Where the stream stands, as plain JSON: after everything delivered, or after that many examples in all.

        Something that fetches ahead of the optimizer (accelerate's loader does, by a batch) has received more than it
        has trained on: pass ``steps × batch_size`` then. The last 16 global batches are remembered.

        Raises:
            RegroupError: the stream does not remember where it stood then.
        """
        wanted = self.examples if examples is None else examples
        for snapshot in self._snapshots:
            if snapshot.examples == wanted:
                return {
                    "format": _FORMAT,
                    "of": self._identity,
                    "examples": snapshot.examples,
                    "cursor": copy.deepcopy(vars(snapshot.cursor)),
                    "buffer": [packed(example) for example in snapshot.buffer],
                    "pass_examples": self.pass_examples,
                }
        raise RegroupError(
            "the stream does not remember where it stood",
            expected=f"one of {', '.join(str(snapshot.examples) for snapshot in self._snapshots)} examples",
            got=wanted,
        )

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from there; call before ``batches``.

        Raises:
            RegroupError: the state is of other data (a file's name or size), objective, seed, buffer or tokenizer.
        """
        before, now = state.get("of", {}), self._identity
        changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
        if state.get("format") != _FORMAT or changed:
            raise RegroupError(
                "the saved state is of another stream of examples",
                expected="; ".join(f"{key}: {before.get(key)}" for key in changed) or f"format {_FORMAT}",
                got="; ".join(f"{key}: {now.get(key)}" for key in changed) or f"format {state.get('format')}",
                remedy="resume with the data and settings of the run, or begin a new one in another --output",
            )
        self._snapshots.clear()
        self.pass_examples = state.get("pass_examples")
        cursor = Cursor(**copy.deepcopy(state["cursor"]))
        self._snapshots.append(_Snapshot(state["examples"], cursor, tuple(map(unpacked, state["buffer"]))))

    def estimated_tokens(self) -> int | None:
        """About how many tokens one pass holds, by the sizes of the data and the first chunks of three sources.

        None where a size is not known beforehand: gzipped files, data sets of the hub.
        """
        if isinstance(self._reader, Mixture):
            return None
        sizes = [source.nbytes() for source in self._reader.sources]
        tokens = nbytes = 0
        for source in self._reader.sources[:3]:
            chunk = next(source.chunks(), None)
            if chunk is not None:
                documents = self.objective.encode(self._tokenizer, chunk.documents)
                tokens += sum(len(side) for document in documents for side in sides(document))
                nbytes += chunk.nbytes
        known = [size for size in sizes if size is not None]
        return round(sum(known) * tokens / max(1, nbytes)) if len(known) == len(sizes) else None

    def take(self, limit: int) -> list[Example]:
        """The next ``limit`` examples, or as many as there are, with their noise; the stream stands where it stood."""
        delivered = self._deliver()
        found = [self._corrupted(number, example) for number, example, _ in islice(delivered, limit)]
        delivered.close()
        return found

    def check(self) -> None:
        """Make the first example, so that what is wrong with the data shows before the first step.

        Raises:
            RegroupError: see ``open_stream``.
        """
        reader = self._reader.given if isinstance(self._reader, Mixture) else self._reader
        if reader is None:
            return  # what the teacher writes is written when it is needed
        produced = reader.examples(Cursor(0, 0, None, {}, 0))
        first = next(produced, None)
        produced.close()
        if first is None:
            raise RegroupError(
                "there is less data than one example",
                file=", ".join(source.name for source in reader.sources),
                remedy="give more data, or a shorter --window",
            )
        batch = self.objective.collate([self._corrupted(0, first[0])])
        largest = max(int(batch[key].max()) for key in batch if key.endswith(("input_ids", "labels")))
        check_vocabulary(largest, self._vocab_size, "special tokens")

    @cached_property
    def _identity(self) -> dict[str, Any]:
        sources = [[source.name, source.nbytes()] for source in self._reader.sources]
        cut = self.objective.encode(self._tokenizer, [("a text", "a text") if self.objective.pairs else "a text"])
        extra: dict[str, Any] = {}
        if isinstance(self._reader, Mixture):
            extra = {"windows of a pass": self._reader.limit}
        return {
            "data": sources,
            "objective": repr(self.objective),
            "tokenizer": f"{len(self._tokenizer)} tokens, {hashlib.sha256(repr(cut).encode()).hexdigest()[:8]}",
            "seed": self._seed,
            "shuffle-buffer": self._room,
            **extra,
        }

    def _draw(self, number: int, below: int) -> int:
        return self._random("draw", number) % below

    def _random(self, use: str, number: int) -> int:
        key = f"{use}/{self._seed}/{number}".encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")

    def _corrupted(self, number: int, example: Example) -> Example:
        return self.objective.corrupt(example, random.Random(self._random("noise", number)))

    def _deliver(self) -> Generator[tuple[int, Example, Any]]:
        """Examples in the global order: number, example, and a function that takes a snapshot of what comes after."""
        snapshot = self._snapshots[-1]
        number, cursor, buffer = snapshot.examples, snapshot.cursor, list(snapshot.buffer)
        while True:
            produced = self._reader.examples(cursor)
            try:
                more = True
                while True:
                    while more and len(buffer) < self._room:
                        found = next(produced, None)
                        if found is None:
                            more, cursor = False, Cursor(cursor.epoch, len(self._reader.sources), None, {}, 0)
                        else:
                            buffer.append(found[0])
                            cursor = found[1]
                    if not buffer:
                        break
                    place = self._draw(number, len(buffer))
                    buffer[place], buffer[-1] = buffer[-1], buffer[place]
                    example = buffer.pop()
                    here = _Snapshot(number + 1, cursor, ())
                    yield number, example, lambda here=here: _Snapshot(here.examples, here.cursor, tuple(buffer))
                    number += 1
            finally:
                produced.close()
            if cursor.epoch == 0:
                self.pass_examples = number
            if self._epochs is not None and cursor.epoch + 1 >= self._epochs:
                return
            cursor = Cursor(cursor.epoch + 1, 0, None, {}, 0)


def open_stream(
    sources: Sequence[str],
    tokenizer: Any,
    objective: Objective,
    *,
    seed: int = 0,
    shuffle_buffer: int = 1024,
    vocab_size: int,
    epochs: int | None = 1,
    workers: int = 0,
    own: SampledWindows | None = None,
    limit: int | None = None,
) -> ExampleStream:
    """A stream over text or pairs.

    Args:
        sources: files (``.txt``, ``.jsonl``, ``.json``, each also ``.gz``; ``.parquet``; for pairs also ``.tsv``),
            folders of those (sorted by path), or data sets of the hub: ``"hf:NAME[:CONFIG[:SPLIT]]"``, or
            ``OWNER/NAME`` where no such path exists. JSON has one object a line. A text file is one document; elsewhere
            documents are in ``text``, and pairs in ``source`` and ``target``.
        tokenizer: a transformers tokenizer.
        objective: see ``regroup.uptraining.objective``.
        seed: of shuffling and of noise.
        shuffle_buffer: examples among which the next one is drawn; 1 or less keeps the order of the data.
        vocab_size: rows of the model's embedding; every id must be below it.
        epochs: passes over the data, each shuffled differently; None for no end. What is left over at the end of a
            pass and makes no whole example is dropped.
        workers: threads that tokenise ahead; the order does not depend on it.
        own: text that the teacher writes: alone where there are no sources, otherwise in turn with theirs.
        limit: examples of a pass, the first ones of the data; None for all.

    Raises:
        RegroupError: a source is missing, empty or unreadable, there is less than one example, or a token is outside
            the vocabulary. What the first example shows is raised here, before the first step.
    """
    stream = ExampleStream(
        find_sources(sources, pairs=objective.pairs) if sources or own is None else [],
        tokenizer,
        objective,
        seed=seed,
        shuffle_buffer=shuffle_buffer,
        vocab_size=vocab_size,
        epochs=epochs,
        workers=workers,
        own=own,
        limit=limit,
    )
    stream.check()
    return stream


def held_out_examples(
    source: str, tokenizer: Any, objective: Objective, *, limit: int, vocab_size: int, seed: int = 0
) -> list[Example]:
    """The first ``limit`` examples of a source in its own order, or as many as it has; the same noise on every call.

    Raises:
        RegroupError: see ``open_stream``.
    """
    stream = open_stream([source], tokenizer, objective, seed=seed, shuffle_buffer=1, vocab_size=vocab_size)
    return stream.take(limit)
