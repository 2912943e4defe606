"""The exception that users see, and how its message and the sizes in it are formatted."""

from __future__ import annotations

from typing import Any

from .safe_text import visible


class RegroupError(Exception):
    """An error that the user can act on: bad input, an impossible request, a full disk.

    The command line prints it without a traceback and exits with status 2. In the message each detail is one line that
    is safe to show on a terminal (``safe_text.visible``); ``details`` holds the values.

    Args:
        what: the problem, in one sentence.
        file, tensor, layer: where it is, as far as known.
        expected, got: what does not match.
        remedy: what to do, in the imperative.
    """

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        tensor: str | None = None,
        layer: str | None = None,
        expected: object = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        self.what = what
        self.details: dict[str, Any] = {
            "file": file,
            "tensor": tensor,
            "layer": layer,
            "expected": expected,
            "got": got,
            "remedy": remedy,
        }
        lines = [visible(what)]
        lines += [f"  {name + ':':<10}{_short(value)}" for name, value in self.details.items() if value is not None]
        super().__init__("\n".join(lines))


class DegenerateTextError(RegroupError):
    """What a model writes is of no use: numbers that are not finite, ends alone, or endless repeats."""


class AgreedError(RegroupError):
    """An error that every process raises; ``speaker`` is True in the process that prints it."""

    def __init__(self, error: RegroupError, *, speaker: bool) -> None:
        super().__init__(error.what, **error.details)
        self.speaker = speaker


def human_kv_heads(count: int) -> str:
    """``8 KV heads``, or ``1 KV head``."""
    return f"{count} KV head{'s' if count != 1 else ''}"


def human_bytes(count: float) -> str:
    """1536 to ``"1.5 KiB"``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def two_sizes(one: float, other: float) -> tuple[str, str]:
    """Two sizes for a comparison: in full if ``human_bytes`` would show them as equal."""
    shown = human_bytes(one), human_bytes(other)
    return shown if shown[0] != shown[1] or one == other else (f"{one:,.0f} B", f"{other:,.0f} B")


def _short(value: object, most: int = 2000) -> str:
    """One line. A damaged file can hold a name of megabytes, and one that a terminal would obey."""
    text = str(value)
    return visible(text) if len(text) <= most else f"{visible(text[:most])}… ({len(text):,} characters)"
