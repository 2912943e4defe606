"""File helpers: kinds of paths, checked JSON, and files that appear when they are complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import select
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A million tensors' worth. Python takes 70 bytes for an empty list, which is two bytes of JSON and a comma.
MAX_JSON_ITEMS = 10_000_000


# Seconds to wait for a writer of a named pipe.
PIPE_TIMEOUT = 10.0

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a disk",
}


def sha256_of(path: Path) -> str:
    """The hash of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def kind_of(path: Path) -> str:
    """The kind of a path in words; links are followed.

    Returns:
        ``"a file"``, ``"a folder"``, ``"a pipe"``, ``"a socket"``, ``"a device"``, ``"a disk"``, or ``"nothing"``.

    Raises:
        OSError: unknown, such as in a folder without permission.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "nothing"
    return "a file" if stat.S_ISREG(mode) else _KINDS.get(stat.S_IFMT(mode), "a special file")


def regular(path: Path) -> os.stat_result:
    """The status of a regular file; opening anything else may block or never end.

    Raises:
        OSError: it is not a regular file; ``strerror`` says what it is.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        number = errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL
        raise OSError(number, f"this is {kind_of(path)} and not a file", str(path))
    return status


def read_once(path: Path, limit: int | None = None) -> bytes:
    """All bytes of a file or of a pipe, such as a shell's ``<(…)``; a pipe can be read only once.

    Args:
        path: of either, ``/dev/stdin`` included.
        limit: bytes at most.

    Raises:
        OSError: it is neither, it holds more, nobody writes to the pipe, or the system refuses.
    """
    if kind_of(path) != "a pipe":
        regular(path)
        with path.open("rb") as file:
            return _bounded(file, limit, path)
    # A blocking open would wait for a writer; after a non-blocking one, poll tells whether there is one.
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(number, "rb") as file:
        waiting = select.poll()
        waiting.register(number, select.POLLIN | select.POLLHUP)
        if not waiting.poll(1000 * PIPE_TIMEOUT):
            raise OSError(errno.EAGAIN, "this is a pipe that nobody writes to", str(path))
        os.set_blocking(number, True)
        return _bounded(file, limit, path)


def _bounded(file: Any, limit: int | None, path: Path) -> bytes:
    raw = file.read(-1 if limit is None else limit + 1)
    if limit is not None and len(raw) > limit:
        raise OSError(errno.EFBIG, f"this holds more than {limit / 1e9:g} GB", str(path))
    return raw


def as_named(name: str | Path) -> Path:
    """The path of a name: with ``~`` as the home folder unless a file of that very name exists."""
    path = Path(name)
    try:
        return path if path.exists() else path.expanduser()
    except (RuntimeError, OSError, ValueError):  # unknown user; invalid name
        return path


def parse_json(raw: bytes, *, strict: bool = False, whole: Callable[[str], Any] = int) -> Any:
    """JSON that is valid UTF-8 text when written again, and of bounded size in memory.

    Args:
        raw: the text.
        strict: refuse Infinity and NaN, which Python writes into configs, and numbers such as 1e999.
        whole: converts the digits of integers; see ``bounded``.

    Raises:
        ValueError, RecursionError: invalid or too large.
    """
    if raw.count(b",") > MAX_JSON_ITEMS:
        raise ValueError(f"more than {MAX_JSON_ITEMS} commas")
    finite = _finite if strict else None
    value = json.loads(raw.decode(), parse_constant=finite, parse_float=finite, parse_int=whole)
    json.dumps(value, ensure_ascii=False).encode()  # escapes can spell text that is not Unicode
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def bounded(text: str) -> int:
    """An integer within the range of float64, for readers that know no other numbers, such as browsers.

    Raises:
        ValueError: it is larger.
    """
    _finite(text)
    return int(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path that is renamed to ``path`` when the block succeeds, and removed when it fails.

    Links are followed, and an existing file keeps its mode. A special file (such as ``/dev/stdout``), or a file in a
    read-only folder, is written to directly.

    Raises:
        OSError: the folder cannot be made, or the system refuses the rest.
    """
    # A pipe behind /dev/stdout has no path of its own, so that what it resolves to does not exist.
    if path.exists() and not path.is_file():
        yield path
        return
    place = path.resolve()
    if place.exists() and not os.access(place.parent, os.W_OK):
        yield place
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = place.with_name(f".{place.name}.regroup-{os.getpid()}")
    try:
        yield stage
        if place.exists():
            shutil.copymode(place, stage)
        stage.replace(place)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise
