"""A model's answers as JSON lines, written as they come, so that a run that was broken off goes on from there."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import RegroupError

_FORMAT = 1


class Outputs:
    """Answers by the number of their row.

    The first line says whose answers to what they are; the rest are one row each. A last line that a kill left half
    written is dropped.

    Args:
        path: the file; None keeps answers in memory alone.
        facts: model, task and settings; a file of other facts is refused.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self._head = ""
        self.rows: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        if path.exists():
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
        raw = path.read_bytes()
    except OSError as error:
        raise RegroupError("the outputs cannot be read", file=path, got=error.strerror or str(error)) from error
    good = raw.rfind(b"\n") + 1
    try:
        head, *lines = [json.loads(line) for line in raw[:good].decode("utf-8").splitlines()]
        rows = {int(line["row"]): line for line in lines}
        if head["format"] != _FORMAT:
            raise KeyError
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise RegroupError(
            "the file does not hold outputs of an evaluation",
            file=path,
            expected=f"JSON lines as `regroup evaluate --task` writes them, format {_FORMAT}",
        ) from None
    return head, rows, good
