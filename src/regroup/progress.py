"""Progress of long work: a bar on a terminal, or lines in a log, at most one per minute."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from .errors import human_bytes

# Seconds between two lines of a log.
MINUTE = 60.0


class Progress:
    """One stage of some work; call it with the amount just done, from any thread.

    Args:
        title: of the stage, such as ``"calibrating"``.
        total: amount of work in ``unit``; None if unknown.
        done: amount that an earlier run did; it does not count for the speed.
        unit: what is counted, in the plural; ``"bytes"`` are shown as sizes.
        calm: redraw rarely, during work that is being timed.
    """

    def __init__(self, title: str, total: int | None, *, done: int = 0, unit: str = "", calm: bool = False) -> None:
        self.title, self.total, self.unit, self.calm = title, total, unit, calm
        self.done = self._first = done
        self.note = ""
        self._lock = threading.Lock()
        self._started = time.monotonic()

    def __call__(self, count: int = 1, note: str | None = None) -> None:
        """Add to the amount done; ``note`` is shown next to it, such as the loss."""
        with self._lock:
            self.done += count
            self.note = self.note if note is None else note
            self.show()

    def expect(self, total: int) -> None:
        """Set the total, once it is known."""
        with self._lock:
            self.total = total
            self.show()

    def begin(self, done: int) -> None:
        """Set the amount that was done before; the speed counts from here."""
        with self._lock:
            self.done = self._first = done
            self._started = time.monotonic()
            self.show()

    def show(self) -> None:
        """Called after every change."""

    def remaining(self) -> float | None:
        """Estimated seconds left, or None if unknown."""
        done = self.done - self._first
        if self.total is None or done <= 0:
            return None
        return (time.monotonic() - self._started) / done * max(0, self.total - self.done)

    def line(self) -> str:
        """Such as ``"calibrating: 12/30 layers, 40%, about 3 min left"``."""
        amount = human_bytes if self.unit == "bytes" else "{:,}".format
        if self.total is None and not self.done:
            so_far = time.monotonic() - self._started
            return f"{self.title} …" if so_far < 1 else f"{self.title}: {duration(so_far)} so far"
        parts = [amount(self.done)]
        if self.total is not None:
            parts = [f"{parts[0]}/{amount(self.total)}"]
        if self.unit not in ("", "bytes"):
            parts[0] += f" {self.unit}"
        if self.total:
            parts.append(f"{self.done / self.total:.0%}")
        left = self.remaining()
        if left is not None and self.done < (self.total or 0):
            parts.append(f"about {duration(left)} left")
        if self.note:
            parts.append(self.note)
        return f"{self.title}: {', '.join(parts)}"


class _Lines(Progress):
    """Lines in a log: one at the start, one per minute, and one at the end of a stage of more than a minute."""

    def __enter__(self) -> _Lines:
        self._ended = threading.Event()
        self._write(self.line())
        self._clock = threading.Thread(target=self._tick, name="progress", daemon=True)
        self._clock.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._ended.set()
        self._clock.join()
        took = time.monotonic() - self._started
        if kind is None and took > MINUTE:
            self._write(f"{self.title}: done after {duration(took)}")

    def _tick(self) -> None:
        while not self._ended.wait(MINUTE):
            with self._lock:
                line = self.line()
            self._write(line)

    def _write(self, line: str) -> None:
        # A failed log must not stop the work.
        stream = sys.stderr
        with contextlib.suppress(OSError, ValueError):
            encoding = getattr(stream, "encoding", None) or "utf-8"
            stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
            stream.flush()


class _Bar(Progress):
    """On a terminal."""

    def __enter__(self) -> _Bar:
        from rich import progress

        from .screen import Screen

        amount: list[Any] = [progress.MofNCompleteColumn()]
        if self.unit == "bytes":
            amount = [progress.DownloadColumn(True), progress.TransferSpeedColumn()]
        title = self.title if self.unit in ("", "bytes") else f"{self.title}, {self.unit}"
        words = progress.TextColumn("{task.description}", markup=False)
        note = progress.TextColumn("{task.fields[note]}", markup=False)
        columns = (words, progress.BarColumn(), *amount, note, progress.TimeRemainingColumn())
        rate = 0.5 if self.calm else 10
        self._shown = progress.Progress(*columns, console=Screen(stderr=True), transient=True, refresh_per_second=rate)
        self._shown.start()
        self._task = self._shown.add_task(title, total=self.total, completed=self.done, note="")
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.stop()

    def show(self) -> None:
        self._shown.update(self._task, completed=self.done, total=self.total, note=self.note)


def on_terminal() -> bool:
    """Whether standard error is a terminal that can show a bar; ``FORCE_COLOR`` does not make it one."""
    try:
        return sys.stderr.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")
    except (AttributeError, ValueError):
        return False


@contextlib.contextmanager
def stage(title: str, total: int | None, *, done: int = 0, unit: str = "", calm: bool = False) -> Iterator[Progress]:
    """Show a stage of some work on standard error while the block runs; see ``Progress``."""
    made = (_Bar if on_terminal() else _Lines)(title, total, done=done, unit=unit, calm=calm)
    with made:
        yield made


def duration(seconds: float) -> str:
    """For a person: ``"40 s"``, ``"3 min"``, ``"2.5 h"``, ``"4 days"``."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.0f} days"


def quiet_libraries() -> None:
    """Keep the bars of transformers, datasets, huggingface_hub and tqdm out of a log, in child processes too.

    The variables are read when a library is imported; one that was imported before is told as well.
    """
    for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(name, "1")
    for name, function in (
        ("huggingface_hub.utils", "disable_progress_bars"),
        ("datasets", "disable_progress_bars"),
        ("transformers.utils.logging", "disable_progress_bar"),
    ):
        if name in sys.modules:
            getattr(sys.modules[name], function)()
