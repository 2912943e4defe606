"""What a command's surroundings may do to it: a terminal of few characters, streams that are closed or full, signals.

Work in progress is worth more than a line about it: what standard error does not take is let go, and the work goes on.
Standard output carries results: where it fails, the command fails.
"""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
import time
from typing import Any, NoReturn

from ..safe_text import visible

# What is written where the encoding has no such character.
_PLAIN = {
    "→": "->", "–": "-", "—": "-", "…": "...", "×": "x", "·": "*", "●": "*", "✓": "+", "✗": "x", "≤": "<=", "≥": ">=",
    "α": "alpha", "±": "+-", "’": "'", "“": '"', "”": '"',
}  # fmt: skip
_HANDLER = "regroup.plain"
# A second signal within so many seconds is the same wish, and not a wish to break off the clean-up.
_IMPATIENCE = 10.0


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


class _Tolerant(io.FileIO):
    """A file that loses what the system does not take."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


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
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False, encoding="utf-8")  # noqa: SIM115
    encoding = getattr(sys.stderr, "encoding", None) or "utf-8"
    raw = io.BufferedWriter(_Tolerant(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(raw, encoding=encoding, line_buffering=True)
    write_anything()


def flush_output() -> OSError | None:
    """Write what standard output still holds; where that cannot be done, drop it and say why.

    Without this, what was lost would be found out by the interpreter as it ends, too late for an exit status.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        try:
            number = sys.stdout.fileno()
        except (OSError, ValueError):  # not a file: a test's, or somebody else's
            return error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, number)
        os.close(nowhere)
        return error
    return None


def catch_signals() -> None:
    """Make a service manager's stop and a closed terminal what Ctrl-C is; signals that are ignored stay so."""
    last = -_IMPATIENCE

    def stop(*_: object) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= _IMPATIENCE:
            last = now
            _interrupt()

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, stop)


def _interrupt() -> NoReturn:
    raise KeyboardInterrupt


def release_signals() -> None:
    """There is nothing left to clean up: from now on a signal just ends the process."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
