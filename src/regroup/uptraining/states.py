"""Saved states of a run: folders ``checkpoint-N`` that appear when they are complete."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..checkpoint.reader import read_json
from ..checkpoint.stage import sync
from ..checkpoint.writer import write_text
from ..errors import RegroupError

RUN_FILE = "run.json"
STATE_FILE = "uptrain_state.json"
MODEL_FOLDER = "model"
OWN_FOLDER = "own"
# Hidden, so that neither we nor transformers takes them for states.
_STAGING = ".saving"
_REMOVED = ".removed-"


@contextlib.contextmanager
def quiet_files() -> Iterator[None]:
    """Without transformers' bars for each file that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextlib.contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep other processes from continuing a run until the block, or this process, ends.

    The lock is on the run's file: one on its folder would be in the way of what is written into the folder
    (``checkpoint.stage``).

    Raises:
        RegroupError: another process holds it.
    """
    with run.open("r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RegroupError(
                "another process is running in the output folder",
                file=run.parent,
                remedy="wait until it has ended, or choose another --output",
            ) from error
        except OSError:  # a file system without locks
            pass
        yield


@contextlib.contextmanager
def begun(output: Path, run: Mapping[str, Any]) -> Iterator[None]:
    """Note in a folder without a run, which is made if need be, what is run there, and hold its lock.

    Raises:
        RegroupError: another process has begun a run there meanwhile.
    """
    output.mkdir(parents=True, exist_ok=True)
    temporary = output / f".{RUN_FILE}.{os.getpid()}"
    write_text(temporary, json.dumps(dict(run), indent=2) + "\n")
    with locked(temporary):
        try:
            os.link(temporary, output / RUN_FILE)  # a rename would replace what another process has linked
        except (FileExistsError, FileNotFoundError) as error:
            raise RegroupError(
                "another process has begun a run in the output folder meanwhile",
                file=output,
                remedy="give the command again when it has ended, or choose another --output",
            ) from error
        finally:
            temporary.unlink(missing_ok=True)
        yield


def complete(output: Path) -> list[tuple[int, Path]]:
    """Step and folder of every complete state, oldest first."""
    found = []
    for path in output.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def staging(output: Path) -> Path:
    """An empty hidden folder for the next state; what a killed run left in it is removed."""
    folder = output / _STAGING
    clean(output)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def clean(output: Path) -> None:
    """Remove what a killed run left half-written or half-removed."""
    for path in [output / _STAGING, *output.glob(f"{_REMOVED}*")]:
        if path.exists():
            shutil.rmtree(path)
    for path in output.glob(f".{RUN_FILE}*"):
        path.unlink(missing_ok=True)


def publish(output: Path, step: int, state: Mapping[str, Any]) -> Path:
    """Give the staged state its name, once all of it is on the disk."""
    name = f"checkpoint-{step}"
    staged = output / _STAGING / name
    write_text(staged / STATE_FILE, json.dumps(dict(state)) + "\n")
    for path in staged.rglob("*"):
        sync(path)
    sync(staged)
    final = output / name
    # The end of the data may fall on a step that was saved already.
    if not final.exists():
        staged.rename(final)
        sync(output)
    shutil.rmtree(output / _STAGING, ignore_errors=True)
    return final


def forget(output: Path) -> None:
    """Remove all that a run wrote which learned nothing: it must not be resumed, let alone be finished."""
    clean(output)
    for _, folder in complete(output):
        remove(folder)
    for name in ("logs", OWN_FOLDER):
        shutil.rmtree(output / name, ignore_errors=True)
    (output / RUN_FILE).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # something that is not the run's lies there
        output.rmdir()


def remove(folder: Path) -> None:
    """Remove a state; its name is gone before its first file is."""
    hidden = folder.with_name(f"{_REMOVED}{folder.name}")
    shutil.rmtree(hidden, ignore_errors=True)
    folder.rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def rotate(output: Path, keep: int, spared: Path | None = None) -> None:
    """Remove all but the newest ``keep`` states, and the one that is spared."""
    for _, folder in complete(output)[:-keep]:
        if folder != spared:
            remove(folder)


def last_before(output: Path, step: int | None) -> Path | None:
    """The newest complete state of an earlier step; of any for None."""
    return next((path for number, path in reversed(complete(output)) if step is None or number < step), None)


def occupied(output: Path) -> dict[str, Any] | None:
    """The run that an output folder holds, or None if it is empty or not there.

    Raises:
        RegroupError: there is something else in it.
    """
    if not output.exists():
        return None
    if not output.is_dir():
        raise RegroupError("the output is a file", file=output, remedy="choose another --output")
    if (output / RUN_FILE).is_file():
        return read_json(output / RUN_FILE)
    if any(not path.name.startswith(".") for path in output.iterdir()):
        raise RegroupError(
            "the output folder holds something else",
            file=output,
            expected="an empty folder, or the run that is to be continued",
            got=", ".join(sorted(path.name for path in output.iterdir())[:4]),
            remedy="choose another --output",
        )
    return None
