"""Numbers of a config, checked before anything is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from ..errors import RegroupError


def is_natural(value: object) -> TypeGuard[int]:
    """Whether this is a positive whole number; JSON's true is none."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def natural(config: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    """The positive whole number under the first of these keys that holds anything.

    Raises:
        RegroupError: none does, or it is no such number below 2**63.
    """
    for key in keys:
        value = config.get(key)
        if value is not None:
            if not is_natural(value) or value >= 2**63:
                raise _impossible(key, "a positive integer", value)
            return value
    raise RegroupError("the config lacks a number that is needed", file="config.json", expected=" or ".join(keys))


def number(config: Mapping[str, Any], key: str, largest: float) -> float:
    """The number from 0 to ``largest`` under a key.

    Raises:
        RegroupError: it is no such number.
    """
    value = config[key]
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= largest:
        raise _impossible(key, f"a number from 0 to {largest:g}", value)
    return float(value)


def flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """The truth value under a key.

    Raises:
        RegroupError: it is something else, which Python would take for true.
    """
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise _impossible(key, "true or false", value)
    return default if value is None else value


def _impossible(key: str, wanted: str, value: object) -> RegroupError:
    return RegroupError(
        "the config holds an impossible value",
        file="config.json",
        expected=f"{key}: {wanted}",
        got=repr(value)[:80],
    )
