"""Windows that the teacher writes, as training data: sampled when they are reached, and kept for later passes."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RegroupError
from ..files import replacing
from ..processes import rank
from .examples import Example
from .reader import Cursor, Reader

# Windows that are sampled together, ahead of the training.
AHEAD = 64
SELF = "self"


def is_own(source: str) -> bool:
    """Whether a source of data is ``self`` or ``self:TOKENS``."""
    return source == SELF or source.startswith(f"{SELF}:")


@dataclass
class SampledWindows:
    """Windows of a stream of the sampler, by number. The same seed gives the same windows.

    They are kept in a folder of the run: several passes, several processes and a run that is continued use what was
    sampled once. The first process samples, the others wait for it.

    Attributes:
        sample: (first, count) to windows (count, window) of token ids; the model behind it is loaded for each call.
        window: tokens.
        seed: of the sampler.
        folder: where windows are kept.
        limit: windows; None for no end.
    """

    sample: Callable[[int, int], np.ndarray]
    window: int
    seed: int
    folder: Path
    limit: int | None = None
    _parts: dict[int, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        return SELF

    def nbytes(self) -> int | None:
        """For the identity of a stream: how many tokens there are."""
        return None if self.limit is None else self.limit * self.window

    def row(self, number: int) -> np.ndarray:
        """Window ``number``, (window,) int32."""
        part, place = divmod(number, AHEAD)
        if part not in self._parts:
            self._parts[part] = self._load(part)
        return self._parts[part][place]

    def digest(self, windows: int) -> str:
        """Hash of the first ``windows`` windows, as far as they were used."""
        found = hashlib.sha256()
        for number in range(windows):
            found.update(self.row(number).tobytes())
        return found.hexdigest()[:16]

    def _load(self, part: int) -> np.ndarray:
        path = self.folder / f"{part * AHEAD:08d}.npy"
        while not path.exists():
            if rank() == 0:
                ids = self.sample(part * AHEAD, AHEAD).astype(np.int32)
                self.folder.mkdir(parents=True, exist_ok=True)
                with replacing(path) as stage, stage.open("wb") as file:
                    np.save(file, ids)
                return ids
            time.sleep(1)  # a barrier would time out; a failure of the first process ends all
        ids = np.load(path, allow_pickle=False)
        if ids.shape != (AHEAD, self.window):
            raise RegroupError("the kept windows are of another run", file=path, remedy=f"remove {self.folder}")
        return ids


@dataclass(frozen=True)
class OwnReader:
    """Examples of own text, in the order of their numbers; an epoch has ``limit`` of them."""

    own: SampledWindows

    @property
    def sources(self) -> Sequence[Any]:
        return [self.own]

    def examples(self, cursor: Cursor) -> Generator[tuple[Example, Cursor], None, None]:
        number = cursor.taken
        while cursor.source == 0 and (self.own.limit is None or number < self.own.limit):
            example = {"ids": self.own.row(number), "starts": np.array([], np.int32)}
            number += 1
            yield example, Cursor(cursor.epoch, 0, None, {}, number)


@dataclass(frozen=True)
class Mixture:
    """Examples of several readers in turn, one from each; an epoch ends where one of them does, or at ``limit``.

    Attributes:
        parts: readers, of given and of own text.
        limit: examples of an epoch; None for no other end.
    """

    parts: tuple[Reader | OwnReader, ...]
    limit: int | None = None

    @property
    def given(self) -> Reader | None:
        """The part that reads files, if there is one."""
        return next((part for part in self.parts if isinstance(part, Reader)), None)

    @property
    def own(self) -> SampledWindows | None:
        """The text that the teacher writes, if any."""
        return next((part.own for part in self.parts if isinstance(part, OwnReader)), None)

    @property
    def sources(self) -> list[Any]:
        return [source for part in self.parts for source in part.sources]

    def examples(self, cursor: Cursor) -> Any:
        """As ``Reader.examples``; ``taken`` counts examples of the epoch, ``carry`` holds the cursors of the parts."""
        if cursor.source >= len(self.sources):
            return
        begin = vars(Cursor(cursor.epoch, 0, None, {}, 0))
        stands = [Cursor(**each) for each in cursor.carry.get("parts", [begin] * len(self.parts))]
        produced = [part.examples(stand) for part, stand in zip(self.parts, stands, strict=True)]
        number = cursor.taken
        try:
            while self.limit is None or number < self.limit:
                place = number % len(self.parts)
                found = next(produced[place], None)
                if found is None:
                    return
                number += 1
                stands[place] = found[1]
                yield found[0], Cursor(cursor.epoch, 0, None, {"parts": [vars(each) for each in stands]}, number)
        finally:
            for each in produced:
                each.close()
