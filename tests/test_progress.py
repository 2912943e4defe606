"""How long work goes on: lines in a log, a bar on a terminal, and nothing of other libraries' in a log."""

from __future__ import annotations

import ast
import contextlib
import io
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import regroup
from regroup import progress
from regroup.progress import Progress, duration, stage

PACKAGE = Path(regroup.__file__).parent


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that have passed, to be set by the test."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_says_what_is_done_and_what_is_left(clock: list[float]) -> None:
    bar = Progress("calibrating", 30, unit="layers")
    assert bar.line() == "calibrating: 0/30 layers, 0%"
    clock[0] = 120.0
    bar(12)
    assert bar.line() == "calibrating: 12/30 layers, 40%, about 3 min left"
    bar(18)
    assert bar.line() == "calibrating: 30/30 layers, 100%"
    bar = Progress("converting", 2 << 30, unit="bytes")
    bar(1 << 29)
    assert bar.line().startswith("converting: 512 MiB/2 GiB, 25%")
    bar = Progress("evaluating", None, unit="rows")
    bar(5)
    assert bar.line() == "evaluating: 5 rows"
    bar.expect(10)
    assert "5/10 rows, 50%" in bar.line()


def test_what_an_earlier_run_did_says_nothing_of_the_speed(clock: list[float]) -> None:
    bar = Progress("uptraining", 1000, done=900, unit="steps")
    assert bar.remaining() is None
    clock[0] = 10.0
    bar(10, "loss 2.0")
    assert bar.line() == "uptraining: 910/1,000 steps, 91%, about 2 min left, loss 2.0"
    begun = Progress("task", 1000)
    begun.begin(900)
    clock[0] = 20.0
    begun(10)
    assert begun.remaining() == pytest.approx(90.0)
    # The control: as if all of it had been done just now.
    assert Progress("x", 1000).remaining() is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.2, "1 s"), (89, "89 s"), (120, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (2 * 86400, "2 days")],
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


class Minutes:
    """In place of an event: so many minutes pass until the stage ends."""

    def __init__(self, minutes: int) -> None:
        self.left = minutes
        self.waited: list[float] = []

    def wait(self, seconds: float) -> bool:
        self.waited.append(seconds)
        self.left -= 1
        return self.left < 0

    def set(self) -> None:
        pass


def test_a_log_gets_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    log, minutes = io.StringIO(), Minutes(3)
    monkeypatch.setattr(sys, "stderr", log)
    bar = progress._Lines("calibrating", 4, unit="layers")
    bar._ended = minutes  # type: ignore[assignment]
    for _ in range(1000):  # calls alone write nothing
        bar(0)
    bar._tick()  # a single layer that takes three minutes
    assert log.getvalue().splitlines() == ["calibrating: 0/4 layers, 0%"] * 3
    assert minutes.waited == [60.0] * 4


def test_a_long_stage_says_when_it_ends(monkeypatch: pytest.MonkeyPatch, clock: list[float]) -> None:
    for seconds, lines in ((180.0, ["x: 0/2, 0%", "x: done after 3 min"]), (30.0, ["x: 0/2, 0%"])):
        log = io.StringIO()
        monkeypatch.setattr(sys, "stderr", log)
        with stage("x", 2):
            clock[0] += seconds
        assert log.getvalue().splitlines() == lines


def test_a_log_that_is_gone_or_knows_ascii_alone_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, encoding="ascii", write_through=True))
    with stage("größer", None) as bar:
        bar(1)
    assert raw.getvalue() == b"gr\\xf6\\xdfer \\u2026\n"
    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stderr", closed)
    with stage("x", 1) as bar:
        bar(1)


def seen(on_terminal: bool, **environment: str) -> str:
    """Standard error of a stage in a process of its own."""
    script = (
        "from regroup.progress import stage\nwith stage('work', 2, unit='things') as bar:\n    bar(1)\n    bar(1)\n"
    )
    given = {**os.environ, "TERM": "xterm", **environment}
    command = [sys.executable, "-c", script]
    if not on_terminal:
        return subprocess.run(command, env=given, capture_output=True, text=True, check=True).stderr
    main, child = pty.openpty()
    subprocess.run(command, env=given, stderr=child, check=True)
    os.close(child)
    found = b""
    with contextlib.suppress(OSError):
        while piece := os.read(main, 4096):
            found += piece
    os.close(main)
    return found.decode()


def test_a_bar_on_a_terminal_and_lines_elsewhere() -> None:
    assert seen(False) == "work: 0/2 things, 0%\n"
    # Whoever wants colours in a log does not want a bar in it.
    assert seen(False, FORCE_COLOR="1") == "work: 0/2 things, 0%\n"
    assert seen(True, TERM="dumb") == "work: 0/2 things, 0%\r\n"
    bar = seen(True)
    assert "\x1b[" in bar
    assert "work, things" in bar
    assert "0%" not in bar


# tqdm reads its variable when it is imported: as in the command, the libraries come afterwards.
LIBRARIES = """
import sys
from regroup.progress import quiet_libraries
quiet_libraries()
import datasets, huggingface_hub.utils, tqdm
from transformers.utils import logging
ways = [huggingface_hub.utils.tqdm, logging.tqdm, tqdm.tqdm, datasets.utils.tqdm]
for bar in ways:
    list(bar(range(3)))
sys.stderr.write("control\\n")
list(tqdm.tqdm(range(3), disable=False))
"""


def test_bars_of_libraries_stay_out_of_a_log() -> None:
    given = {k: v for k, v in os.environ.items() if "PROGRESS_BAR" not in k and k != "TQDM_DISABLE"}
    done = subprocess.run([sys.executable, "-c", LIBRARIES], env=given, capture_output=True, text=True, check=True)
    quiet, loud = done.stderr.split("control\n")
    assert quiet == ""
    assert "3/3" in loud


def bars(source: str) -> Iterator[str]:
    """Whatever a module imports or calls to draw a bar."""
    for node in ast.walk(ast.parse(source)):
        names: list[Any] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        yield from (name for name in names if name.startswith(("rich.progress", "tqdm", "rich.live", "rich.status")))


def test_one_module_alone_draws_bars() -> None:
    drawing = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(bars(path.read_text(encoding="utf-8")))
    }
    assert drawing <= {"progress.py"}
    assert list(bars("from rich.progress import Progress\nimport tqdm")) == ["rich.progress.Progress", "tqdm"]
