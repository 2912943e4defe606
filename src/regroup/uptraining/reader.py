"""From sources to examples in the order of the data, a chunk at a time, from any point on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import local
from typing import Any

from ..data.batches import check_vocabulary
from ..data.chunking import Chunk, Source
from ..errors import RegroupError
from .examples import Carry, Example, Objective, Tokens


@dataclass(frozen=True)
class Cursor:
    """How far the data were read.

    Attributes:
        epoch, source: numbers, from 0; a source beyond the last one stands for the end of the epoch.
        position: of a chunk in the source.
        carry: what the chunks before it left over.
        taken: examples of it that went on to the buffer.
    """

    epoch: int
    source: int
    position: Any
    carry: Carry
    taken: int


@dataclass(frozen=True)
class Reader:
    """What turns sources into examples; see ``regroup.uptraining.stream.open_stream`` for its parts."""

    sources: Sequence[Source]
    tokenizer: Any
    objective: Objective
    vocab_size: int
    workers: int = 0

    def examples(self, cursor: Cursor) -> Any:
        """Examples of an epoch in the order of the data, each with the cursor after it; closed by whoever stops."""
        carry, skipped = cursor.carry, cursor.taken
        encoded = self._encoded(self._read(cursor))
        try:
            for source, chunk, tokens in encoded:
                self._check_vocabulary(tokens, self.sources[source].name)
                examples, after = self._packed(tokens, carry, self.sources[source].name)
                for taken in range(skipped, len(examples)):
                    here = Cursor(cursor.epoch, source, chunk.position, carry, taken + 1)
                    yield examples[taken], here
                carry, skipped = after, 0
        finally:
            encoded.close()

    def _packed(self, tokens: Tokens, carry: Carry, where: str) -> tuple[list[Example], Carry]:
        try:
            return self.objective.pack(tokens, carry)
        except RegroupError as error:
            # The objective does not know of files.
            raise RegroupError(error.what, **{**error.details, "file": where}) from error

    def _read(self, cursor: Cursor) -> Iterator[tuple[int, Chunk]]:
        for number in range(cursor.source, len(self.sources)):
            position = cursor.position if number == cursor.source else None
            for chunk in self.sources[number].chunks(position):
                yield number, chunk

    def _encoded(self, chunks: Iterator[tuple[int, Chunk]]) -> Any:
        """Chunks tokenised, in their order; with workers some of them ahead."""
        if not self.workers:
            for source, chunk in chunks:
                documents = self.objective.encode(self.tokenizer, chunk.documents)
                yield source, chunk, Tokens(documents, chunk.begins, chunk.ends)
            return
        # A tokenizer that is configured by one thread may not be in use by another.
        mine = local()

        def encode(chunk: Chunk) -> Tokens:
            return Tokens(self.objective.encode(mine.tokenizer, chunk.documents), chunk.begins, chunk.ends)

        def prepare() -> None:
            mine.tokenizer = copy.deepcopy(self.tokenizer)

        pool = ThreadPoolExecutor(self.workers, initializer=prepare)
        waiting: deque[tuple[int, Chunk, Future[Tokens]]] = deque()
        try:
            for source, chunk in chunks:
                waiting.append((source, chunk, pool.submit(encode, chunk)))
                if len(waiting) > 2 * self.workers:
                    first = waiting.popleft()
                    yield first[0], first[1], first[2].result()
            for source, chunk, future in waiting:
                yield source, chunk, future.result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _check_vocabulary(self, tokens: Tokens, where: str) -> None:
        largest = max((max(side) for document in tokens.documents for side in sides(document) if side), default=0)
        check_vocabulary(largest, self.vocab_size, where)


def sides(document: Any) -> tuple[Sequence[int], ...]:
    """The tokens of a text, or of the source and the target of a pair."""
    return document if isinstance(document, tuple) else (document,)
