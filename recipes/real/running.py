"""Steps in processes of their own: how long each takes, how much memory, and what is there need not be done again."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from regroup.errors import RegroupError

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Usage:
    """What a process took: wall-clock and processor seconds, and the most memory that it held at once."""

    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int


# A module and its arguments, and a file for what it says.
Runner = Callable[[Sequence[str], Path], Usage]


def in_a_process(command: Sequence[str], log: Path) -> Usage:
    """Run ``python -m COMMAND``.

    Raises:
        RegroupError: it failed; with the end of what it said.
    """
    # The recipes are no installed package.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "120"}
    started = time.perf_counter()
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ python -m {shlex.join(command)}\n")
        file.flush()
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=file, stderr=file, env=environment)
        try:
            _, status, used = os.wait4(process.pid, 0)
        except BaseException:
            process.terminate()
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RegroupError(
            "a step failed",
            file=log,
            expected=shlex.join(command),
            got="\n".join(log.read_text(encoding="utf-8").splitlines()[-12:]),
            remedy="mend what it says, and give the same command again: what is done is kept",
        )
    # Bytes on macOS, kilobytes elsewhere.
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Usage(time.perf_counter() - started, used.ru_utime + used.ru_stime, peak)


@dataclass(frozen=True)
class Kept:
    """Results on disk: a file for each, complete or not there.

    Attributes:
        folder: of the results.
        runner: of commands.
        say: what is told of them.
    """

    folder: Path
    runner: Runner
    say: Callable[[str], None]

    def path(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def has(self, name: str) -> bool:
        return self.path(name).exists()

    def load(self, name: str) -> dict[str, Any]:
        return json.loads(self.path(name).read_text(encoding="utf-8"))

    def save(self, name: str, value: dict[str, Any]) -> dict[str, Any]:
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(value), encoding="utf-8")
        part.replace(path)
        return value

    def command(self, name: str, command: Sequence[str], made: Path) -> dict[str, Any]:
        """Have a command make a file or folder, unless it is there and what it took is known.

        Returns:
            ``Usage``; ``resumed`` if an earlier run was broken off, of which the time is not known.
        """
        key = f"commands/{name}"
        if self.has(key) and made.exists():
            return self.load(key)
        begun = self.folder / "commands" / f"{name}.begun"
        begun.parent.mkdir(parents=True, exist_ok=True)
        resumed = begun.exists()
        begun.touch()
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        found = asdict(self.runner(command, log)) | {"resumed": resumed}
        begun.unlink()
        self.say(f"{name}: {found['seconds']:.0f} s, {found['peak_memory_bytes'] / 1e9:.1f} GB")
        return self.save(key, found)
