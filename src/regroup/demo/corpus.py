"""The demonstration's text: the source of Python's standard library, which every machine already has.

The list of files is fixed and shipped (`corpus.txt`), so that two machines read the same files; their contents follow
the Python that runs. Which of them are held out is decided by each file's path alone, so the split needs no state, does
not move when a file changes or is added, and is the same on every version of Python.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from regroup.errors import RegroupError

HELD_OUT_BELOW = 13  # of the 256 values of a digest's first byte: 5.1% of the files
REQUIRED_SHARE = 0.5  # with fewer of the listed files than this, numbers would not be comparable


@dataclass(frozen=True)
class Availability:
    """Which of the listed files a folder holds. Both are relative paths, in the list's order."""

    present: tuple[str, ...]
    missing: tuple[str, ...]


@cache
def corpus_files() -> tuple[str, ...]:
    """The fixed list of standard library modules, as sorted relative paths such as `asyncio/locks.py`.

    All are in Python 3.11 and none was removed or turned into a package by 3.14. Tests, generated tables, applications
    (IDLE, turtledemo) and bundled packages are left out.
    """
    listing = resources.files("regroup.demo").joinpath("corpus.txt").read_text(encoding="utf-8")
    return tuple(listing.split())


def is_held_out(path: str) -> bool:
    """Whether a file is kept from training: the first byte of sha256(`path`) is below `HELD_OUT_BELOW`.

    Args:
        path: relative to the standard library, with forward slashes on every system, e.g. `email/message.py`.
    """
    return hashlib.sha256(path.encode()).digest()[0] < HELD_OUT_BELOW


def training_files() -> tuple[str, ...]:
    """The listed paths that may be trained on, in the list's order."""
    return tuple(path for path in corpus_files() if not is_held_out(path))


def held_out_files() -> tuple[str, ...]:
    """The listed paths kept for evaluation, in the list's order."""
    return tuple(path for path in corpus_files() if is_held_out(path))


def stdlib_folder() -> Path:
    """The folder of the running Python's standard library. It need not exist (a zipped library has none)."""
    return Path(sysconfig.get_path("stdlib"))


def availability(folder: Path | None = None) -> Availability:
    """Look for the listed files.

    Args:
        folder: a standard library; by default, the running Python's.

    Returns:
        the listed files that are there and those that are not. Some are missing on systems that split the library
        into several packages, such as tkinter on Debian.
    """
    folder = folder or stdlib_folder()
    present = tuple(path for path in corpus_files() if (folder / path).is_file())
    return Availability(present, tuple(path for path in corpus_files() if path not in set(present)))


def training_text(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Read the training files one at a time, in the list's order.

    Args:
        folder: a standard library; by default, the running Python's.

    Returns:
        an iterator of (relative path, text). Files that this Python lacks are skipped.

    Raises:
        RegroupError: at once, if less than half of the listed files are there as source.
    """
    return _read(folder or stdlib_folder(), training_files())


def held_out_text(folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """The held-out files, read as ``training_text`` reads those for training."""
    return _read(folder or stdlib_folder(), held_out_files())


def _read(folder: Path, wanted: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    found = availability(folder)
    if len(found.present) < REQUIRED_SHARE * len(corpus_files()):
        raise RegroupError(
            "The demonstration's text, the source of Python's standard library, is not here: the library seems to be "
            "zipped, stripped of its source, or elsewhere.",
            file=folder,
            expected=f"most of the {len(corpus_files())} files of corpus.txt",
            got=f"{len(found.present)}; the first missing is {found.missing[0]}",
            remedy="Run with an ordinary Python 3.11 or later that keeps its library as .py files.",
        )
    present = set(found.present)
    # A generator here, not in the callers, so that the check above runs when they are called.
    return ((path, (folder / path).read_text(encoding="utf-8")) for path in wanted if path in present)
