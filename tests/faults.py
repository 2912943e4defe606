"""What a disk and a system do to a program: an error, or the end, at the n-th call that changes what is on the disk."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Every function of the system that the writer, shutil and tempfile change the disk by.
CHANGES = (
    *("pwrite", "copy_file_range", "sendfile", "fsync", "truncate", "rename", "replace"),
    *("mkdir", "chmod", "unlink", "remove", "rmdir"),
)
READS = ("pread", "preadv")


class Calls:
    """Counts calls, and acts before the n-th one."""

    def __init__(self, action: Callable[[str], None], at: int, *, only: str | None = None) -> None:
        self.action, self.at, self.only = action, at, only
        self.names: list[str] = []

    def seen(self, name: str, where: object) -> None:
        if self.only is not None and self.only not in str(where):
            return
        self.names.append(name)
        if len(self.names) - 1 == self.at:
            self.action(name)

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.seen(name, arguments[0])
            return real(*arguments, **named)

        return call

    def wrap_open(self, real: Callable[..., Any], writes: Callable[..., bool]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            if writes(*arguments, **named):
                self.seen("open", arguments[0])
            return real(*arguments, **named)

        return call


def _mode_writes(file: object, mode: str = "r", *_: Any, **__: Any) -> bool:
    return any(letter in mode for letter in "wax+")


def _flags_write(file: object, flags: int, *_: Any, **__: Any) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


@contextlib.contextmanager
def at_call(number: int, action: Callable[[str], None]) -> Iterator[Calls]:
    """Act before the n-th call that changes the disk, from 0; the block gets the count."""
    calls = Calls(action, number)
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            # Nobody pulls the plug: what is not flushed is there all the same, and sooner.
            patch.setattr(os, name, calls.wrap(name, (lambda fd: None) if name == "fsync" else getattr(os, name)))
        patch.setattr(os, "open", calls.wrap_open(os.open, _flags_write))
        for module in (io, builtins):
            patch.setattr(module, "open", calls.wrap_open(module.open, _mode_writes))
        yield calls


def fail(number: int) -> Callable[[str], None]:
    """An action: the system refuses with this errno."""

    def action(name: str) -> None:
        raise OSError(number, os.strerror(number))

    return action


def die(name: str) -> None:
    """An action: what the kernel does when memory is short, and an operator when patience is."""
    del name
    os.kill(os.getpid(), signal.SIGKILL)


def killed_at(numbers: Iterable[int], run: Callable[[int], None], root: Path) -> list[int]:
    """Run something in one process after another, each killed before its n-th change of the disk, until one is not.

    To be called in a process that has not started threads. ``run`` gets n, for which there is a folder below ``root``.

    Returns:
        The numbers of the runs that were killed.
    """
    killed = []
    for number in numbers:
        (root / str(number)).mkdir()
        child = os.fork()
        if child == 0:
            try:
                with at_call(number, die):
                    run(number)
                os._exit(0)
            except BaseException as error:
                print(f"run {number}: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0, f"run {number} ended with {status}"
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed.append(number)
    return killed


def below(folder: Path) -> list[str]:
    """Names in a folder, hidden ones too."""
    return sorted(path.name for path in folder.iterdir())
