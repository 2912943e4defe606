"""Files of text: JSON that is checked as it is read, and a file that appears when it is complete."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# A million tensors' worth. Python takes 70 bytes for an empty list, which is two bytes of JSON and a comma.
MAX_JSON_ITEMS = 10_000_000


def parse_json(raw: bytes, *, strict: bool = False, whole: Callable[[str], Any] = int) -> Any:
    """JSON that can be written as UTF-8 again, and that does not become a hundred times larger in memory.

    Args:
        raw: the text.
        strict: without Infinity and NaN, which Python writes into configs and which are no JSON, and without numbers
            such as 1e999 that become one of them.
        whole: makes whole numbers of their digits; see ``bounded``.

    Raises:
        ValueError, RecursionError: it is not that.
    """
    if raw.count(b",") > MAX_JSON_ITEMS:
        raise ValueError(f"more than {MAX_JSON_ITEMS} commas")
    finite = _finite if strict else None
    value = json.loads(raw.decode(), parse_constant=finite, parse_float=finite, parse_int=whole)
    json.dumps(value, ensure_ascii=False).encode()  # escapes can spell text that is not Unicode
    return value


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def bounded(text: str) -> int:
    """A whole number that a reader which knows floating-point numbers alone can take, such as a browser.

    Raises:
        ValueError: it is beyond them.
    """
    _finite(text)
    return int(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A hidden name beside a path, that becomes it when the block ends well and is removed when it does not.

    A link stays a link, and a file keeps its mode. What is no file (such as ``/dev/stdout``), or lies in a folder that
    takes no new one, is itself what the block writes to.

    Raises:
        OSError: the folder cannot be made, or the system refuses the rest.
    """
    place = path.resolve()
    staged = not place.exists() or (place.is_file() and os.access(place.parent, os.W_OK))
    if not staged:
        yield place
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    stage = place.with_name(f".{place.name}.regroup-{os.getpid()}")
    try:
        yield stage
        if place.exists():
            shutil.copymode(place, stage)
        stage.replace(place)
    except BaseException:
        stage.unlink(missing_ok=True)
        raise
