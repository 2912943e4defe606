"""Records as the page needs them: read, checked, and named."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegroupError

_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """A record and the name of its file.

    Attributes:
        file: name alone; where it lies is nobody's business.
        kind: what was measured; ``"plan"`` for a plan's file.
        date: of the measurement, or none.
        configuration, results: as in the file.
        machine, versions: as in the file; empty for plans.
    """

    file: str
    kind: str
    date: str
    configuration: dict[str, Any]
    results: dict[str, Any]
    machine: dict[str, Any]
    versions: dict[str, Any]

    @property
    def conditions(self) -> str:
        """Date and machine, for a caption."""
        day = self.date[:10]
        machine = self.machine.get("accelerator") or self.machine.get("processor")
        if machine and "accelerator" not in self.machine:
            threads = self.machine.get("threads", "?")
            machine = f"{machine}, {threads} thread{'' if threads == 1 else 's'}"
        return ", ".join(str(part) for part in (self.file, day, machine) if part)


def read_records(paths: Sequence[Path]) -> list[Record]:
    """Read files; one that holds several records (``runs``) gives them all.

    Raises:
        RegroupError: unreadable, not JSON, no record, or of another format.
    """
    found: list[Record] = []
    for path in paths:
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise RegroupError("the record cannot be read", file=path, got=str(error)[:200]) from error
        except ValueError as error:
            raise RegroupError("the record is not valid JSON", file=path, got=str(error)[:200]) from error
        found += _records(value, path)
    return found


def _records(value: Any, path: Path) -> list[Record]:
    if isinstance(value, dict) and "fingerprint" in value and isinstance(value.get("layers"), list):
        results = {"layers": value["layers"], "family": value.get("family")}
        return [Record(path.name, "plan", "", {}, results, {}, {})]
    wanted = {"kind": str, "configuration": dict, "results": dict}
    if not isinstance(value, dict) or not all(isinstance(value.get(k), kind) for k, kind in wanted.items()):
        raise RegroupError(
            "the file is not a record",
            file=path,
            expected="JSON that a verb of regroup wrote with -o, or a plan",
            got=f"{type(value).__name__}" + (f" with {', '.join(list(value)[:6])}" if isinstance(value, dict) else ""),
        )
    if value.get("format") != _FORMAT:
        raise RegroupError(
            "the record is of another format", file=path, expected=f"format {_FORMAT}", got=value.get("format")
        )
    if value["kind"] == "benchmark/decode-runs":
        return [record for run in value["results"].get("runs", []) for record in _records(run, path)]
    return [
        Record(
            path.name,
            value["kind"],
            str(value.get("date", "")),
            value["configuration"],
            value["results"],
            value.get("machine") or {},
            value.get("versions") or {},
        )
    ]
