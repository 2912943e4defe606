"""Records as the page needs them: read, checked, and named."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import RegroupError, human_bytes
from ..files import bounded, parse_json
from .plausible import impossible

_FORMAT = 1
_PLAN_FORMAT = "regroup-plan/1"
_MOST_BYTES = 100_000_000


@dataclass(frozen=True)
class Record:
    """A record and the name of its file.

    Attributes:
        file: name, with as many of its folders as distinguish it from the others; the rest of the path is left out.
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
        RegroupError: unreadable, not JSON, no record, of another format, or with numbers that cannot be.
    """
    found: list[Record] = []
    names = short_names([str(path) for path in paths])
    for path in dict.fromkeys(paths):
        try:
            size = path.stat().st_size
            raw = path.read_bytes() if size <= _MOST_BYTES else b""
        except OSError as error:
            raise RegroupError("the record cannot be read", file=path, got=error.strerror or str(error)) from error
        if size > _MOST_BYTES:
            raise RegroupError(
                "the file is larger than any record",
                file=path,
                expected=f"at most {human_bytes(_MOST_BYTES)}",
                got=human_bytes(size),
            )
        try:
            value = parse_json(raw, strict=True, whole=bounded)
        except (ValueError, RecursionError) as error:
            raise RegroupError(
                "the record is not valid JSON",
                file=path,
                got=str(error)[:200],
                remedy="give the file as the command wrote it",
            ) from error
        found += _records(value, path, names[str(path)])
        amiss = next(impossible(value), None)
        if amiss is not None:
            place, expected, got = amiss
            raise RegroupError(
                "the record holds an impossible value",
                file=path,
                expected=f"{place}: {expected}",
                got=got[:200],
                remedy="give the file as the command wrote it",
            )
    return found


def short_names(places: Sequence[str]) -> dict[str, str]:
    """Short names of paths and hub ids: the last part of each, or as many as distinguish it from the others."""
    parts = {place: posixpath.normpath(place).split("/") for place in places}
    counts = dict.fromkeys(parts, 1)
    while True:
        names = {place: "/".join(words[-counts[place] :]) for place, words in parts.items()}
        often = Counter(names.values())
        clash = [place for place in parts if often[names[place]] > 1 and counts[place] < len(parts[place])]
        if not clash:
            return names
        for place in clash:
            counts[place] += 1


def labels(found: Sequence[tuple[str, str]]) -> list[str]:
    """Names of models, each with the file of its record; with the file in it where one model stands there twice."""
    short = short_names([model for model, _ in found])
    often = Counter(short[model] for model, _ in found)
    return [short[model] + (f", {file}" if often[short[model]] > 1 else "") for model, file in found]


def _records(value: Any, path: Path, name: str) -> list[Record]:
    if isinstance(value, dict) and "fingerprint" in value and isinstance(value.get("layers"), list):
        _check_format(value, _PLAN_FORMAT, path)
        results = {"layers": value["layers"], "family": value.get("family")}
        return [Record(name, "plan", "", {}, results, {}, {})]
    if not isinstance(value, dict):
        raise _no_record(path, type(value).__name__)
    for key, kind in (("kind", str), ("configuration", dict), ("results", dict)):
        if not isinstance(value.get(key), kind):
            raise _no_record(path, f"{key}: {str(value[key])[:80]}" if key in value else f"nothing as {key}")
    _check_format(value, _FORMAT, path)
    for key, kind in (("date", str), ("machine", dict), ("versions", dict)):
        if not isinstance(value.get(key) or kind(), kind):
            raise _no_record(path, f"{key}: {str(value[key])[:80]}")
    if value["kind"] == "benchmark/decode-runs":
        runs = value["results"].get("runs")
        nested = isinstance(runs, list) and any(isinstance(r, dict) and r.get("kind") == value["kind"] for r in runs)
        if not isinstance(runs, list) or not runs or nested:
            raise _no_record(path, f"runs: {str(runs)[:80]}")
        return [record for run in runs for record in _records(run, path, name)]
    return [
        Record(
            name,
            value["kind"],
            value.get("date") or "",
            value["configuration"],
            value["results"],
            value.get("machine") or {},
            value.get("versions") or {},
        )
    ]


def _check_format(value: dict[str, Any], expected: object, path: Path) -> None:
    found = value.get("format")
    if type(found) is not type(expected) or found != expected:
        raise RegroupError(
            "the record is of another format",
            file=path,
            expected=f"format {expected}",
            got="none" if found is None else repr(found)[:80],
            remedy="make it again with this version of regroup",
        )


def _no_record(path: Path, got: str) -> RegroupError:
    return RegroupError(
        "the file is not a record",
        file=path,
        expected="JSON that a regroup command wrote with -o, or a plan",
        got=got,
    )
