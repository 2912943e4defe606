"""The registry of attention backends: what a backend declares, and the order in which ``auto`` tries them.

A backend is one file of :mod:`regroup.attention.backends` that calls :func:`register`. Nothing else names it, except
the line there that imports it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .call import Call


@dataclass(frozen=True)
class Preference:
    """Calls for which ``backend="auto"`` considers a backend.

    Attributes:
        priority: the backend with the highest priority is tried first.
        applies: whether the preference is for a call. It must not branch on sizes if ``call.any_size``.
        why: the reason, in a few words, which ``explain`` reports.
    """

    priority: int
    applies: Callable[[Call], bool]
    why: str


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        name: the value of the ``backend`` argument.
        preferences: when ``backend="auto"`` considers it; without any, it is used only by name.
        unsupported_reason: the reason why it cannot serve a call, or None.
        run: computes a supported call; (B, H, T, Dv) in the query's dtype.
        not_preferred: why another backend was taken for a call that it could serve, which ``explain`` reports.
    """

    name: str
    preferences: tuple[Preference, ...]
    unsupported_reason: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]
    not_preferred: str


BY_NAME: dict[str, Backend] = {}
# Every preference with its backend, the highest priority first.
IN_ORDER: list[tuple[Preference, Backend]] = []


def register(backend: Backend) -> None:
    """Add a backend.

    Raises:
        TypeError: a part of it is missing or of the wrong type.
        ValueError: its name is taken.
    """
    texts = [backend.name, backend.not_preferred, *(each.why for each in backend.preferences)]
    functions = [backend.unsupported_reason, backend.run, *(each.applies for each in backend.preferences)]
    if not all(isinstance(text, str) and text for text in texts):
        raise TypeError(f"attention backend {backend.name!r}: name, not_preferred and every why must be text")
    if not all(map(callable, functions)):
        raise TypeError(f"attention backend {backend.name!r}: unsupported_reason, run and applies must be functions")
    if not all(isinstance(each.priority, int) for each in backend.preferences):
        raise TypeError(f"attention backend {backend.name!r}: priorities must be whole numbers")
    if backend.name == "auto" or backend.name in BY_NAME:
        raise ValueError(f"there is already an attention backend {backend.name!r}")
    BY_NAME[backend.name] = backend
    IN_ORDER.extend((each, backend) for each in backend.preferences)
    IN_ORDER.sort(key=lambda entry: -entry[0].priority)
