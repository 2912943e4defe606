"""The settings of a recipe as a person writes them: names, kinds and ranges."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin

import yaml

from ..errors import RegroupError
from ..files import read_once
from .budget import parse_count
from .schedule import SCHEDULES

OBJECTIVES = ("causal", "span-corruption", "pairs")
OPTIMIZERS = ("muon", "adamw", "adafactor")
DTYPES = ("float32", "bfloat16", "float16")

# Of earlier states: what to do instead.
_REMOVED: dict[str, str] = dict.fromkeys(
    ("stages", "local_share"),
    "leave it out; layers are distilled one by one in conversion: regroup convert with --calibration TEXT",
)
_CHOICES = {
    "objective": ("auto", *OBJECTIVES),
    "optimizer": ("auto", *OPTIMIZERS),
    "schedule": ("auto", *SCHEDULES),
    "dtype": DTYPES,
    "windows": ("auto", "packed", "documents"),
}
# Whole numbers are counted with in 64 bits.
_LARGEST = 2**63 - 1
# Least and greatest value. A bound in _OPEN is not reached itself.
_RANGES: dict[str, tuple[float, float | None]] = {
    "alpha": (0, 1),
    "pretraining_tokens": (1, None),
    "tokens": (1, None),
    "unique_tokens": (1, None),
    "steps": (1, None),
    "temperature": (0, None),
    "distill_weight": (0, 1),
    "hidden_weight": (0, None),
    "top_k": (1, None),
    "window": (2, None),
    "max_target": (2, None),
    "batch_size": (0, None),
    "micro_batch": (1, None),
    "epochs": (1, None),
    "learning_rate": (0, None),
    "attention_rate": (0, None),
    "adamw_rate": (0, None),
    "warmup": (0, 1),
    "decay": (0, 1),
    "original_steps": (1, None),
    "weight_decay": (0, None),
    "betas": (0, 1),
    "dropout": (0, 1),
    "clip_norm": (0, None),
    "seed": (0, 2**32 - 1),  # as NumPy takes them
    "shuffle_buffer": (1, None),
    "workers": (0, None),
    "held_out_windows": (1, None),
    "eval_every": (1, None),
    "save_every": (1, None),
    "keep": (1, None),
    "log_every": (1, None),
    "spike_factor": (0, None),
}
_OPEN = {
    **dict.fromkeys(("alpha", "temperature", "learning_rate", "attention_rate", "adamw_rate"), "low"),
    **dict.fromkeys(("dropout", "betas"), "high"),
}


def read_settings(path: Path) -> dict[str, Any]:
    try:
        value = yaml.safe_load(read_once(path).decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RegroupError("the recipe cannot be read", file=path, got=str(error)[:200]) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise RegroupError("the recipe is not valid YAML", file=path, got=" ".join(str(error).split())[:200]) from error
    value = {} if value is None else value
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RegroupError("the recipe is not a table of settings", file=path, expected="lines such as: steps: 1000")
    twice = {key.replace("-", "_") for key in value}
    if len(twice) < len(value):
        raise RegroupError("the recipe gives a setting twice, once with hyphens", file=path)
    return value


def unknown_setting(key: str, known: list[str], path: Path | None) -> RegroupError:
    close = get_close_matches(key, known, n=3)
    return RegroupError(
        "the recipe has a setting that is not known",
        file=path,
        expected=" or ".join(close) if close else "one of " + ", ".join(known),
        got=key,
        remedy=_REMOVED.get(key),
    )


def checked(key: str, value: Any, hint: Any, path: Path | None) -> Any:
    """A value as its field has it."""

    def refuse(expected: str) -> RegroupError:
        return RegroupError(
            f"the setting {key} of the recipe has a value that it cannot have",
            file=path,
            expected=expected,
            got=repr(value),
        )

    options = get_args(hint) if NoneType in get_args(hint) else (hint,)
    if value is None:
        if NoneType in options:
            return None
        raise refuse("a value")
    kind = next(option for option in options if option is not NoneType)
    try:
        result = _as(kind, value)
    except (TypeError, ValueError, RegroupError):
        raise refuse(_word(kind)) from None
    parts = result if isinstance(result, tuple) else (result,)
    if any(type(part) is int and part > _LARGEST for part in parts):
        raise refuse(f"at most {_LARGEST}")
    if key in _CHOICES and result not in _CHOICES[key]:
        raise refuse("one of " + ", ".join(_CHOICES[key]))
    if key in _RANGES:
        low, high = _RANGES[key]
        for part in parts:
            above = part > low if _OPEN.get(key) == "low" else part >= low
            below = high is None or (part < high if _OPEN.get(key) == "high" else part <= high)
            if not (above and below and abs(part) != float("inf")):
                bounds = [f"{'above' if _OPEN.get(key) == 'low' else 'at least'} {low}"]
                bounds += [] if high is None else [f"{'below' if _OPEN.get(key) == 'high' else 'at most'} {high}"]
                raise refuse(", ".join(bounds))
    return result


def _as(kind: Any, value: Any) -> Any:
    if get_origin(kind) is tuple:
        inner = get_args(kind)
        items = [value] if isinstance(value, (str, Path)) else list(value)
        if inner[-1] is not ... and len(items) != len(inner):
            raise ValueError
        return tuple(_as(inner[0], item) for item in items)
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError
        return value
    if isinstance(value, bool):
        raise TypeError
    if kind is int:
        if isinstance(value, float):
            if not value.is_integer():
                raise ValueError
            return int(value)
        return value if isinstance(value, int) else parse_count(_text(value))
    if kind is float:
        # YAML 1.1 reads 1e-4, without a point, as text.
        return float(value)
    return kind(_text(value))


def _text(value: Any) -> str:
    if not isinstance(value, (str, Path)) or not str(value):
        raise TypeError
    return str(value)


def _word(kind: Any) -> str:
    if get_origin(kind) is tuple:
        many = get_args(kind)[-1] is ...
        return f"a list of {'' if many else f'{len(get_args(kind))} '}{_word(get_args(kind)[0]).split(' ', 1)[1]}"
    return {
        bool: "a truth value, true or false",
        int: "a whole number, such as 1000 or 65k",
        float: "a number",
        Path: "a path",
        str: "a text",
    }[kind]
