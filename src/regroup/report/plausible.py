"""Whether the numbers of a record are such as there can be; what a page would otherwise draw as if they were."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

# Names of fields, and what their numbers must be, wherever in a record they stand. Lists and tables of such numbers
# count too: "kv_heads" may be a number, a list of them, or one for each layer. In a table a name of its own goes first.
_COUNTS = (
    "num_attention_heads|num_key_value_heads|original_num_key_value_heads|num_heads|heads|kv_heads|head_dim|d_kv|hidden_size|"
    "vocab_size|batch|context|prompt|new|threads|cores|devices|window|tokens_per_step|repeats"
)
_AMOUNTS = (
    r".*_bytes|.*_bytes_.*|bytes_.*|.*_seconds|seconds|seconds_.*|.*_ms|ms|milliseconds|.*_flops|flops|.*_tokens|"
    r"tokens|steps|rows|windows|parameters|largest_batch|.*_per_second|tokens_per_second|"
    r"perplexity|bits_per_byte|spikes|alpha|epochs|layers|.*_layers|layers_of_the_model|.*nats_per_token|p20|p50|p80|"
    r"runs|seeds|words|query_order|largest_difference|.*_error_rate.*|.*speedup.*|.*utilisation|ratio.*|"
    r"fraction_of_.*|.*_milliseconds|fastest|slowest|.*_gb|gigabytes"
)
# Whatever they are of, differences too.
_SPREADS = r".*standard_error|.*standard_deviation"
# Differences may have either sign, although their names end like those of losses.
_SIGNED = r"excess.*|.*_excess.*|intercept"
_SHARES = r"top1_agreement|accuracy|energy|fraction"
_WHOLE = "a whole number of 1 or more"
_KINDS = (
    (re.compile(_COUNTS), _WHOLE, lambda x: float(x).is_integer() and x >= 1),
    (re.compile(_SHARES), "a share between 0 and 1", lambda x: 0 <= x <= 1),
    (re.compile(_SPREADS), "a number that is not negative", lambda x: x >= 0),
    (re.compile(_SIGNED), "a number", lambda x: True),
    (re.compile(_AMOUNTS), "a number that is not negative", lambda x: x >= 0),
)
# Fields of which the first may not be above the second.
_ORDERED = (
    ("num_key_value_heads", "num_attention_heads"),
    ("num_key_value_heads", "original_num_key_value_heads"),
    ("p20", "p50"),
    ("p50", "p80"),
    ("loss_low", "loss"),
    ("loss", "loss_high"),
    ("loss_after_low", "loss_after"),
    ("loss_after", "loss_after_high"),
)


def impossible(value: Any, place: str = "") -> Iterator[tuple[str, str, str]]:
    """The fields of a record that hold what cannot be: their place, what is expected there, and what it is.

    Args:
        value: a record or a part of it, plain data.
        place: of the part, such as ``"results.layers[2]"``.
    """
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from impossible(item, f"{place}[{number}]")
    if not isinstance(value, dict):
        return
    for name, item in value.items():
        where = f"{place}.{name}" if place else name
        kind = _kind(name)
        if kind is not None:
            yield from _wrong(item, where, *kind)
        yield from impossible(item, where)
    for low, high in _ORDERED:
        pair = value.get(low), value.get(high)
        if _number(pair[0]) and _number(pair[1]) and pair[0] > pair[1]:  # type: ignore[operator]
            yield f"{place}.{low}" if place else low, f"at most {high}, {pair[1]}", str(pair[0])
    heads, groups = value.get("num_attention_heads"), value.get("num_key_value_heads")
    if type(heads) is int and type(groups) is int and groups > 0 and heads % groups:
        yield f"{place}.num_key_value_heads", f"a divisor of {heads}, the query heads", str(groups)


def _kind(name: str) -> tuple[str, Any] | None:
    return next(((words, holds) for pattern, words, holds in _KINDS if pattern.fullmatch(name)), None)


def _wrong(item: Any, where: str, words: str, holds: Any) -> Iterator[tuple[str, str, str]]:
    if isinstance(item, dict):
        for name, part in item.items():
            if _kind(name) is None and not isinstance(part, bool):
                yield from _wrong(part, f"{where}.{name}", words, holds)
        return
    if isinstance(item, list):
        for number, part in enumerate(item):
            if not isinstance(part, dict):  # its own fields are looked at
                yield from _wrong(part, f"{where}[{number}]", words, holds)
    elif isinstance(item, bool) or (_number(item) and not holds(item)) or (isinstance(item, str) and words == _WHOLE):
        yield where, words, repr(item)


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
