"""A grid of attention shapes, measured in one go or in pieces that a file keeps."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..record import record
from .attention import OperatorRoofs, Shape, measure, too_large

# Beyond it a result is measured anew when its file is used again, and kept if it was calmer.
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
    """Measure shapes that are not measured yet, or were disturbed.

    Args:
        limit: bytes of keys and values beyond which a shape is left out, which the record says.
        work: a file of results, a line each; made if it is not there. Shapes in it are left out, unless other
            processes disturbed them.
        minutes: stop after so long; None: not before the end.
        flex: see :func:`attention.measure`.
        each: is given each result when it is there.

    Returns:
        The record, or None if it is not complete yet.

    Raises:
        RegroupError: the file holds something else.
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
        reason = too_large(shape, limit)
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
    """Of the processors, what others had while a shape was measured."""
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
                "the file of results holds something else",
                file=f"{work}, line {number}",
                expected="what an earlier run with --work wrote",
                got=line[:80],
                remedy="name another file, or remove this one",
            ) from error
        found[_key(shape)] = result
    return found
