"""The teacher's top-k logits on the disk, so that a second run on the same examples needs no teacher.

One file of equal places, one for each example of the global order. A place is written in one piece with a checksum of
its content: what a killed run left half-written is not read but made again. Processes write to places of their own.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import RegroupError
from .distill import TopK

_MAGIC = b"regroup teacher logits 1\n"
_HEADER_BYTES = 4096
_PLACE = np.dtype([("checksum", "<u4"), ("positions", "<u4")])


class TeacherCache:
    """Top-k logits of a teacher for each example, by its number in the global order.

    Args:
        folder: where the file lies; made if it does not exist.
        facts: everything that decides which examples these are and what the teacher gives for them: data, objective,
            window, seed, tokenizer, teacher, temperature. Plain JSON.
        k: tokens that are kept apart.
        positions: that carry loss in one example, at most.
        vocabulary: of the teacher.

    Raises:
        RegroupError: the folder holds logits of something else, or cannot be used.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any], *, k: int, positions: int, vocabulary: int) -> None:
        self.path = folder / "teacher.bin"
        self.k, self.positions = k, positions
        # Ids of a vocabulary that fits are kept in 16 bits.
        self._ids = np.dtype("<u2" if vocabulary <= 1 << 16 else "<u4")
        self._place = _PLACE.itemsize + positions * (k * self._ids.itemsize + (k + 1) * 2)
        digest = hashlib.sha256(json.dumps(dict(facts), sort_keys=True).encode()).hexdigest()
        header = {"digest": digest, "k": k, "positions": positions, "place": self._place, "facts": dict(facts)}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not self.path.exists():
                _create(self.path, header)
            self._fd = os.open(self.path, os.O_RDWR)
        except OSError as error:
            raise RegroupError(
                "the teacher's cache cannot be used", file=folder, got=error.strerror or str(error)
            ) from error
        found = self._header()
        if found.get("digest") != digest or found.get("place") != self._place or found.get("k") != k:
            os.close(self._fd)
            raise RegroupError(
                "the teacher's cache belongs to another run",
                file=self.path,
                expected=_differences(header["facts"], found.get("facts", {})) or f"top_k {k}, {positions} positions",
                got="logits for other examples, or of another teacher",
                remedy="choose another --teacher-cache, or remove this one",
            )

    def close(self) -> None:
        os.close(self._fd)

    def missing(self, numbers: Iterable[int]) -> bool:
        """True if one of them was never written. Content is checked by ``read``."""
        for number in numbers:
            raw = os.pread(self._fd, _PLACE.itemsize, self._offset(number))
            if len(raw) < _PLACE.itemsize or not np.frombuffer(raw, _PLACE)["positions"][0]:
                return True
        return False

    def write(self, numbers: Sequence[int], counts: Sequence[int], value: TopK) -> None:
        """Keep the teacher's logits for some examples.

        Args:
            numbers: of the examples.
            counts: positions that carry loss in each; ``value`` holds them one after another.
            value: log-probabilities are rounded to float16.
        """
        ids = value.ids.cpu().numpy().astype(self._ids)
        log_q = value.log_q.float().cpu().numpy().astype(np.float16)
        start = 0
        for number, count in zip(numbers, counts, strict=True):
            assert count <= self.positions, f"{count} positions for a place of {self.positions}"
            body = ids[start : start + count].tobytes() + log_q[start : start + count].tobytes()
            head = np.array([(zlib.crc32(body), count)], _PLACE).tobytes()
            os.pwrite(self._fd, head + body, self._offset(number))
            start += count

    def read(self, numbers: Sequence[int], counts: Sequence[int], device: torch.device | str = "cpu") -> TopK | None:
        """What was kept of some examples, log-probabilities normalised again in float32; None if one is missing."""
        ids, log_q = [], []
        for number, count in zip(numbers, counts, strict=True):
            raw = os.pread(self._fd, self._place, self._offset(number))
            if len(raw) < _PLACE.itemsize:
                return None
            head = np.frombuffer(raw[: _PLACE.itemsize], _PLACE)[0]
            middle = _PLACE.itemsize + count * self.k * self._ids.itemsize
            end = middle + count * (self.k + 1) * 2
            if head["positions"] != count or zlib.crc32(raw[_PLACE.itemsize : end]) != head["checksum"]:
                return None
            ids.append(np.frombuffer(raw[_PLACE.itemsize : middle], self._ids).reshape(count, self.k))
            log_q.append(np.frombuffer(raw[middle:end], np.float16).reshape(count, self.k + 1))
        values = torch.from_numpy(np.concatenate(log_q).astype(np.float32)).to(device)
        return TopK(torch.from_numpy(np.concatenate(ids).astype(np.int64)).to(device), values.log_softmax(-1))

    def _offset(self, number: int) -> int:
        return _HEADER_BYTES + number * self._place

    def _header(self) -> dict[str, Any]:
        raw = os.pread(self._fd, _HEADER_BYTES, 0)
        if not raw.startswith(_MAGIC):
            return {}
        try:
            return dict(json.loads(raw[len(_MAGIC) :].rstrip(b"\0").decode()))
        except ValueError:
            return {}


def _create(path: Path, header: Mapping[str, Any]) -> None:
    """The file with its header, or another process's: whoever is first."""
    text = _MAGIC + json.dumps(header).encode()
    if len(text) > _HEADER_BYTES:
        text = _MAGIC + json.dumps({**header, "facts": {}}).encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(text.ljust(_HEADER_BYTES, b"\0"))
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def _differences(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> str:
    changed = [name for name in wanted if found.get(name) != wanted[name]]
    return "; ".join(f"{name} {wanted[name]!r}, not {found.get(name)!r}" for name in changed)[:400]
