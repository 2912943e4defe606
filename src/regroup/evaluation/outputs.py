"""A model's answers as JSON lines, written as they come, so that a run that was broken off resumes from there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..files import kind_of, read_once

_FORMAT = 1


class Outputs:
    """Answers by the number of their row.

    The first line names the model, the task and the settings; the others are one row each. A last line that a killed
    run left half-written is dropped.

    Args:
        path: the file, new or empty or of the same facts; None keeps answers in memory alone.
        facts: model, task and settings; a file of other facts is refused.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self._head = ""
        self.rows: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        kind = kind_of(path)
        if kind not in ("a file", "nothing"):
            raise RegroupError("the outputs cannot be kept", file=path, expected="a file", got=kind)
        if kind == "a file" and path.stat().st_size:
            found, self.rows, good = read(path)
            for name, value in facts.items():
                if found.get(name) != value:
                    raise RegroupError(
                        "the outputs are of another evaluation",
                        file=path,
                        expected=f"{name} {value}",
                        got=found.get(name),
                        remedy="name another file with --outputs, or delete this one",
                    )
            with path.open("r+b") as file:
                file.truncate(good)
            return
        # Written with the first answers: what is refused before leaves no file.
        self._head = json.dumps({"format": _FORMAT, **facts}) + "\n"

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Keep answers; each has ``row``, the number of its row."""
        rows = list(rows)
        self.rows |= {row["row"]: row for row in rows}
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as file:
                file.write(self._head + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            self._head = ""
        except OSError as error:
            raise RegroupError(
                "the outputs cannot be written", file=self._path, got=error.strerror or str(error)
            ) from error


def read(path: Path) -> tuple[dict[str, Any], dict[int, dict[str, Any]], int]:
    """The facts of a file of outputs, its rows, and how many of its bytes are whole lines.

    Raises:
        RegroupError: not such a file.
    """
    try:
        raw = read_once(path)
    except OSError as error:
        raise RegroupError("the outputs cannot be read", file=path, got=error.strerror or str(error)) from error
    good = raw.rfind(b"\n") + 1
    try:
        # Not splitlines: answers hold separators of other kinds, such as U+2028, as they are.
        head, *lines = [json.loads(line) for line in raw[:good].decode("utf-8").split("\n")[:-1]]
        rows = {line["row"]: line for line in lines}
        if head["format"] != _FORMAT or not all(map(_answered, lines)):
            raise KeyError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RegroupError(
            "the file does not hold outputs of an evaluation",
            file=path,
            expected=f"JSON lines as `regroup evaluate --task` writes them, format {_FORMAT}",
        ) from None
    return head, rows, good


def _answered(line: dict[str, Any]) -> bool:
    """Whether a line has what its metrics need: an answer and its length, or likelihoods."""
    if type(line["row"]) is not int:
        return False
    if "log_likelihoods" in line:
        found = line["log_likelihoods"]
        return isinstance(found, list) and bool(found) and all(type(value) is float for value in found)
    return isinstance(line["answer"], str) and type(line["tokens"]) is int
