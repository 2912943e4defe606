"""How many KV heads where: the cheapest choice for each layer within a cache of so many bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction

from ..errors import RegroupError
from ..layout.types import AttentionLayer
from .check import allowed_kv_heads

__all__ = ["allocate", "allowed_kv_heads", "layer_units", "parse_budget", "token_bytes"]

# Choices so far, the last one first; states that differ in the last one share the others.
_Chain = tuple[int, "_Chain"] | None


def token_bytes(layer: AttentionLayer, kv_heads: int, itemsize: int = 2) -> int:
    """Bytes of keys and values that a layer keeps for one token: 2 · G · D · bytes per number.

    In cross-attention tokens are the encoder's; a sliding window drops tokens later. Neither changes what one takes.

    Args:
        layer: whose head_dim counts.
        kv_heads: G.
        itemsize: bytes per number of the cache; 2 for 16 bits.
    """
    return 2 * kv_heads * layer.head_dim * itemsize


def layer_units(layer: AttentionLayer, itemsize: int = 2, tensor_parallel: int = 1) -> dict[int, int]:
    """Bytes per token for each number of KV heads that a plan may give a layer, for ``allocate``.

    A KV head that tensor parallelism copies to several devices counts once.

    Raises:
        RegroupError: the query heads cannot be divided over that many devices.
    """
    return {heads: token_bytes(layer, heads, itemsize) for heads in allowed_kv_heads(layer, tensor_parallel)}


def allocate(
    costs: Sequence[Mapping[int, float]],
    units: Sequence[Mapping[int, int]],
    budget: int,
    *,
    full: int | None = None,
) -> list[int]:
    """Choose one number of KV heads for each layer: the lowest sum of costs within the budget, exactly.

    A multiple-choice knapsack by dynamic programming over what is spent. Only totals that can be reached are kept, and
    of those only the ones that no cheaper one undercuts, so that large and odd units cost no more than small ones.

    Args:
        costs: for each layer, what each choice costs; choices that are absent are not made.
        units: for each layer, what each of these choices takes of the budget, such as bytes per token.
        budget: the most that all layers may take together.
        full: what a percentage in the message refers to; by default what the layers take at most.

    Returns:
        One choice per layer. Of equal costs the one that takes fewer units.

    Raises:
        RegroupError: even the smallest choices exceed the budget, or a cost is not finite.
    """
    least = sum(min(unit[choice] for choice in cost) for cost, unit in zip(costs, units, strict=True))
    if least > budget:
        whole = full or sum(max(unit[choice] for choice in cost) for cost, unit in zip(costs, units, strict=True))
        raise RegroupError(
            "the budget is smaller than the smallest KV cache that these layers can have",
            expected=f"at least {least} bytes per token, at 16 bits a number",
            got=f"{budget} bytes per token",
            remedy=f"pass at least {_percent(least, whole)}",
        )
    # (spent, cost, choices), by what is spent; the cost falls along the list.
    front: list[tuple[int, float, _Chain]] = [(0, 0.0, None)]
    for number, (cost, unit) in enumerate(zip(costs, units, strict=True)):
        for choice, value in cost.items():
            if not math.isfinite(value):
                raise RegroupError(
                    "what a number of KV heads costs is not a finite number",
                    expected="finite costs",
                    got=f"layer {number}, {choice} KV heads: {value}",
                    remedy="look for NaN or infinity in the weights, or in what was measured on text",
                )
        reached: dict[int, tuple[float, _Chain]] = {}
        for spent, so_far, chain in front:
            for choice, value in sorted(cost.items()):
                total, paid = spent + unit[choice], so_far + value
                if total <= budget and (total not in reached or paid < reached[total][0]):
                    reached[total] = paid, (choice, chain)
        front = []
        for spent, (so_far, chain) in sorted(reached.items(), key=lambda state: state[0]):
            if not front or so_far < front[-1][1]:
                front.append((spent, so_far, chain))
    # Nothing that is left costs less than the last, and nothing of its cost takes less.
    chain, chosen = front[-1][2], []
    while chain is not None:
        choice, chain = chain
        chosen.append(choice)
    return chosen[::-1]


def _percent(part: int, whole: int) -> str:
    """A share in percent, rounded up, so that what is advised is enough."""
    hundredths = -(-part * 10_000 // whole)
    return f"{hundredths / 100:g}%"


_AMOUNT = re.compile(r"([0-9]{1,15}(?:\.[0-9]{0,15})?|\.[0-9]{1,15}) *(%|[A-Za-z]+)?")
_BYTES = {"b": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
_FORMS = "a share such as 25% or 0.25, or bytes per token such as 64KiB, at 16 bits a number"


def parse_budget(text: str, full: int) -> int:
    """Bytes per token, from ``"25%"``, ``"0.25"`` or ``"64KiB"``.

    A number without a unit is a share, so that 25 is never read as 25 bytes. ``kB`` is 1000 bytes, ``KiB`` 1024.

    Args:
        text: what a person asks for.
        full: bytes per token of the original model.

    Raises:
        RegroupError: unreadable, nothing, or more than the original model takes.
    """
    match = _AMOUNT.fullmatch(text.strip())
    unit = (match[2] or "").lower() if match else ""
    if match is None or (unit not in ("", "%") and unit not in _BYTES):
        raise RegroupError("the KV budget cannot be read", expected=_FORMS, got=repr(text))
    number = Fraction(match[1])
    if unit == "" and number > 1:
        raise RegroupError(
            "the KV budget has no unit",
            expected=_FORMS,
            got=text,
            remedy=f"write {match[1]}% for a share of the original cache, {match[1]}B for bytes per token",
        )
    # Exact: a budget that is met to the byte is met.
    wanted = number * _BYTES[unit] if unit in _BYTES else number * full / (100 if unit else 1)
    if wanted < 1:
        raise RegroupError("the KV budget leaves no cache", expected="at least one byte per token", got=text)
    if wanted > full:
        raise RegroupError(
            "the KV budget is larger than the original model's cache",
            expected=f"at most 100%, {full} bytes per token at 16 bits a number",
            got=text,
            remedy="ask for less; without a budget nothing has to shrink",
        )
    return math.floor(wanted)
