"""A grid of attention shapes, measured in one run or in several, with results in a file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..record import record
from .attention import OperatorRoofs, Shape, measure, unsupported_reason

# With a larger share of other processes, a shape is measured again in the next run, and the calmer result is kept.
DISTURBED = 0.05


def run_grid(
    shapes: Sequence[Shape],
    *,
    device: str = "cpu",
    limit: int,
    work: Path | None = None,
    minutes: float | None = None,
    flex: bool = False,
    each: Callable[[dict[str, Any]], None] = lambda _: None,
) -> dict[str, Any] | None:
    """Measure shapes that are not measured yet, or were disturbed by other processes.

    Args:
        limit: largest size of keys and values in bytes; the record lists larger shapes as omitted.
        work: a file of results, one per line; created if necessary. Shapes in it are not measured again, unless
            other processes disturbed them.
        minutes: time limit; None: no limit.
        flex: see :func:`attention.measure`.
        each: called with each result.

    Returns:
        The record, or None if it is not complete.

    Raises:
        RegroupError: the file has other contents.
    """
    found = _read(work)
    started = time.perf_counter()
    roofs = None
    for shape in shapes:
        before = found.get(_key(shape))
        if before is not None and not _disturbed(before):
            continue
        if minutes is not None and time.perf_counter() - started > 60 * minutes:
            return None
        reason = unsupported_reason(shape, limit)
        if reason is not None:
            result: dict[str, Any] = {**asdict(shape), "left_out": reason}
        else:
            roofs = roofs or OperatorRoofs(device)
            result = measure(shape, roofs, flex=flex)
            if before is not None and _share(result) > _share(before):
                continue
        found[_key(shape)] = result
        if work is not None:
            with work.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
        each(result)
    configuration = {
        "heads": sorted({shape.heads for shape in shapes}),
        "head_dim": sorted({shape.head_dim for shape in shapes}),
        "kv_heads": sorted({shape.kv_heads for shape in shapes}, reverse=True),
        "batch": sorted({shape.batch for shape in shapes}),
        "context": sorted({shape.context for shape in shapes}),
        "dtype": sorted({shape.dtype for shape in shapes}),
        "device": device,
        "limit_bytes": limit,
    }
    return record("benchmark/attention", configuration, {"shapes": [found[_key(shape)] for shape in shapes]})


def _share(result: dict[str, Any]) -> float:
    """The share of the processors that other processes had while a shape was measured."""
    return result.get("other_processes_share_of_cpu") or 0.0


def _disturbed(result: dict[str, Any]) -> bool:
    return _share(result) > DISTURBED


def _key(shape: Shape) -> str:
    return json.dumps(asdict(shape), sort_keys=True)


def _read(work: Path | None) -> dict[str, dict[str, Any]]:
    if work is None or not work.exists():
        return {}
    found = {}
    for number, line in enumerate(work.read_text(encoding="utf-8").splitlines(), 1):
        try:
            result = json.loads(line)
            shape = Shape(**{name: result[name] for name in Shape.__dataclass_fields__})
        except (ValueError, KeyError, TypeError) as error:
            raise RegroupError(
                "the file does not contain results of this benchmark",
                file=f"{work}, line {number}",
                expected="a file of an earlier run with --work",
                got=line[:80],
                remedy="choose another file, or remove this one",
            ) from error
        found[_key(shape)] = result
    return found
