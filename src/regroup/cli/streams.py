"""Robustness against the environment: terminals without Unicode, streams that are closed or full, signals.

Errors of standard error are ignored, since the work is worth more than a line about it. Standard output carries
results: if writing to it fails, the command fails.
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

# Replacements for characters that the encoding lacks.
_PLAIN = {
    "→": "->", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*", "●": "*", "✓": "+", "✗": "x", "≤": "<=", "≥": ">=",
    "α": "alpha", "±": "+-", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_HANDLER = "regroup.plain"
# A second signal within these seconds repeats the first, and does not interrupt the clean-up.
_SAME_SIGNAL_SECONDS = 10.0
# Delay before a signal that was lost is sent again.
_RESEND_SECONDS = 0.05


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    found = error.object[error.start : error.end]
    return "".join(_PLAIN.get(c) or _ascii(visible(c)) for c in found), error.end


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()


codecs.register_error(_HANDLER, _plain)


def accept_any_text() -> None:
    """Make standard output and standard error accept any text: characters that the encoding lacks are spelt out."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=_HANDLER)


class LostOutputError(Exception):
    """Writing to standard output failed.

    Not an OSError, because those are errors of the files that a command reads and writes.
    """

    def __init__(self, error: OSError) -> None:
        self.reason = error.strerror or str(error)
        # A reader that closed the pipe, such as head, gets no message.
        self.unread = isinstance(error, BrokenPipeError)
        super().__init__(self.reason)


class _Tolerant(io.FileIO):
    """A file that ignores failed writes."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


class _Watched(io.FileIO):
    """A file that raises on the first failed write and ignores all later ones."""

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
    """Make the standard streams of this process safe to use.

    A closed descriptor below 3 is opened on ``/dev/null``: otherwise the next file would get its number, and prints of
    libraries would end up among weights. Such a standard output is read-only, so that losing a result is an error.
    """
    for number, mode in ((0, os.O_RDONLY), (1, os.O_RDONLY), (2, os.O_WRONLY)):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, mode)  # takes the lowest free number
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False, encoding="utf-8")  # noqa: SIM115 - open as long as the process
    sys.stdout = _text(_Watched(1, "w", closefd=False), sys.stdout, line_buffering=os.isatty(1))
    sys.stderr = _text(_Tolerant(2, "w", closefd=False), sys.stderr, line_buffering=True)


def _text(raw: io.FileIO, before: Any, *, line_buffering: bool) -> io.TextIOWrapper:
    """A stream that replaces another, which is None if the descriptor was closed."""
    encoding = getattr(before, "encoding", None) or "utf-8"
    return io.TextIOWrapper(io.BufferedWriter(raw), encoding=encoding, errors=_HANDLER, line_buffering=line_buffering)


def log_safely() -> None:
    """Escape control characters in logs and warnings of libraries, which quote names from checkpoints."""
    made, formatted = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        found = made(*args, **kwargs)
        found.msg, found.args = _lines(found.getMessage()), ()
        return found

    logging.setLogRecordFactory(record)
    warnings.formatwarning = lambda *args, **kwargs: _lines(formatted(*args, **kwargs))


def _lines(text: str) -> str:
    return "\n".join(map(visible, text.split("\n")))


class _Interrupt(KeyboardInterrupt):
    """A signal that is sent again if somebody swallows the exception.

    A library's bare ``except:`` does so, and C code such as ``PyObject_HasAttr``, which drops every error of a
    ``__getattr__``. A handler of the exception keeps it alive meanwhile.
    """

    # Called with the signal's number; None when no signal is to be sent again.
    again: Callable[[int], None] | None = None

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __del__(self) -> None:
        if _Interrupt.again is not None:
            _Interrupt.again(self.number)


def work_ended() -> None:
    """From now on no signal is sent again."""
    _Interrupt.again = None


def catch_signals() -> Callable[[], None]:
    """Handle SIGTERM and SIGHUP like Ctrl-C; signals that are ignored stay ignored.

    Returns:
        A function to call after the clean-up: from then on a signal ends the process.
    """
    last: float | None = None
    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def stop(number: int, *_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if last is None or now - last >= _SAME_SIGNAL_SECONDS:
            last = now
            raise _Interrupt(number)

    def again(number: int) -> None:
        nonlocal last
        last = None
        # Not here, where an exception would be lost too.
        timer = threading.Timer(_RESEND_SECONDS, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()

    def take(handler: Any) -> None:
        for number in numbers:
            signal.signal(number, handler)

    def release() -> None:
        work_ended()
        # After one signal the others are ignored, so that the exit status is the message's. Python removes its own
        # handlers as it exits.
        if last is None:
            take(signal.SIG_DFL)
        else:
            atexit.register(take, signal.SIG_IGN)

    _Interrupt.again = again
    take(stop)
    return release
