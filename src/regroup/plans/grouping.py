"""Which heads form a group: arithmetic on head numbers.

In every kernel and serving engine query head h uses KV head h // n, so "these heads share a key and a value" means an
order of query heads in which they stand together.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence


def group_members(order: Sequence[int], groups: int) -> list[list[int]]:
    """Original query heads in each new group: group g takes positions g * n up to (g + 1) * n."""
    n = len(order) // groups
    return [list(order[g * n : (g + 1) * n]) for g in range(groups)]


def key_value_sources(order: Sequence[int], parent_kv_heads: int, groups: int) -> list[list[int]]:
    """Original KV heads that each new KV head is merged from, repeated by weight.

    A grouped original counts as if every query head had its own copy of its KV head; common repetition is divided out,
    so keeping the number of KV heads takes each head exactly once.

    Example:
        8 query heads, 4 KV heads, to 2 groups: ``[[0, 1], [2, 3]]``. 12 query heads, 6 KV heads, to 4 groups: the first
        group takes KV heads ``[0, 0, 1]``, two thirds of one and a third of the next.
    """
    per_parent = len(order) // parent_kv_heads
    sources = []
    for members in group_members(order, groups):
        counts = Counter(head // per_parent for head in members)
        common = math.gcd(*counts.values())
        sources.append([head for head, count in counts.items() for _ in range(count // common)])
    return sources
