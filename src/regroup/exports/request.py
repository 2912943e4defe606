"""The options of an export, and its result."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..listener import Listener

TARGETS = ("hf", "vllm", "gguf")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        destination: the folder, or the GGUF file.
        form: what it is, in words.
        checked: the result of the comparison with the source; None with ``check=False``.
        notes: what the user should know of it.
    """

    destination: Path
    form: str
    checked: str | None
    notes: tuple[str, ...] = ()


@dataclass
class Request:
    """The options of an export (see ``exports.run.export``)."""

    to: str
    expand: bool = False
    tensor_parallel: int | None = None
    dtype: str | None = None
    check: bool = True
    listener: Listener = field(default_factory=Listener)
    notes: list[str] = field(default_factory=list)
