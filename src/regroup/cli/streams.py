"""What a command's surroundings may do to it: a terminal of few characters, streams that are closed or full, signals.

Work in progress is worth more than a line about it: what standard error does not take is let go, and the work goes on.
Standard output carries results: where it fails, the command fails.
"""

from __future__ import annotations

import atexit
import codecs
import io
import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable
from typing import Any

from ..safe_text import visible

# What is written where the encoding has no such character.
_PLAIN = {
    "→": "->", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*", "●": "*", "✓": "+", "✗": "x", "≤": "<=", "≥": ">=",
    "α": "alpha", "±": "+-", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_HANDLER = "regroup.plain"
# A second signal within so many seconds is the same wish, and not a wish to break off the clean-up.
_IMPATIENCE = 10.0
# Seconds after which a signal that was lost comes again.
_MOMENT = 0.05


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _ascii(visible(c)) for c in found), error.end


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


codecs.register_error(_HANDLER, _plain)


def write_anything() -> None:
    """Let standard output and standard error take every text, spelt out where their encoding lacks a character."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


class LostOutputError(Exception):
    """Standard output took less than was written to it.

    No OSError: this is not about the files that the work at hand reads and writes, whose errors those are.
    """

    def __init__(self, error: OSError) -> None:
        self.reason = error.strerror or str(error)
        # A reader that has seen enough, such as head, wants no message.
        self.unread = isinstance(error, BrokenPipeError)
        super().__init__(self.reason)


class _Tolerant(io.FileIO):
    """A file that loses what the system does not take."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


class _Watched(io.FileIO):
    """A file that says once that the system did not take everything; what comes after that is lost too."""

    lost = False

    def write(self, data: Any) -> int:
        if self.lost:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.lost = True
            raise LostOutputError(error) from error


def guard_streams() -> None:
    """Make the streams of this process such that work may rely on them.

    A descriptor below 3 that is closed is opened on ``/dev/null``: otherwise the next file would get its number, and
    whatever libraries print would end up among weights. Nothing can be written to such a standard output, so that a
    result that goes nowhere is an error.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest number that is free
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - as long as the process
    sys.stdout = _text(_Watched(1, "w", closefd=False), sys.stdout, line_buffering=os.isatty(1))
    sys.stderr = _text(_Tolerant(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _text(raw: io.FileIO, before: Any, *, line_buffering: bool) -> io.TextIOWrapper:
    """A stream in the place of another, which is None where the descriptor was closed."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=_HANDLER, line_buffering=line_buffering)


def log_safely() -> None:
    """Spell out what a terminal would obey in what libraries log and warn of: they quote names from checkpoints."""
    made, formatted = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        found = made(*args, **kwargs)
        # Their own lines stay lines.
        found.msg, found.args = _lines(found.getMessage()), ()
        return found

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: _lines(formatted(*args, **kwargs))


def _lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


class _Interrupt(KeyboardInterrupt):
    """A signal that is not lost: where somebody swallows the exception, the signal comes again.

    A library's ``except:`` does so, and C code that asks whether an object has an attribute (``PyObject_HasAttr``
    forgets every error of a ``__getattr__``). Whoever handles the exception keeps it alive meanwhile.
    """

    # Called with the signal's number; None while nobody waits for it.
    again: Callable[[int], None] | None = None

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __del__(self) -> None:
        if _Interrupt.again is not None:
            _Interrupt.again(self.number)


def settled() -> None:
    """The work has ended, however: no signal has to come again."""
    _Interrupt.again = None


def catch_signals() -> Callable[[], None]:
    """Make a service manager's stop and a closed terminal what Ctrl-C is; signals that are ignored stay so.

    Returns:
        What to call at the end, when there is nothing left to clean up: from then on a signal just ends the process.
    """
    last: float | None = None
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def stop(number: int, *_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or now - last >= _IMPATIENCE:
            last = now
            raise _Interrupt(number)

    def again(number: int) -> None:
        nonlocal last
        last = None
        # Not here, where whatever is raised is lost too, but a moment later.
        timer = threading.Timer(_MOMENT, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    def take(handler: Any) -> None:
        for number in numbers:
            signal.signal(number, handler)

    def release() -> None:
        settled()
        # After one signal the next ones have nothing to say; the exit status is the message's. Python takes its own
        # handlers away as it ends.
        if last is None:
            take(signal.SIG_DFL)
        else:
            atexit.register(take, signal.SIG_IGN)

    _Interrupt.again = again
    take(stop)
    return release
