"""The merge methods: what each is called, what it needs and which functions carry it out.

A new method is one entry here and the functions that the entry names (CONTRIBUTING.md). Importing this module does not
import torch, so that plans and the command line can name the methods; the functions are imported when they are used.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class MergeMethod:
    """One way to make one key or value head of several.

    A method pools heads (each tensor by itself, element by element), or shares them by linear maps that queries and
    outputs absorb (``merge.sharing``), or can do both. Functions are named as ``"module:function"`` below
    ``regroup.merge``.

    Attributes:
        name: as in plans and ``--method``.
        summary: one line for people.
        pool: ``f(heads) -> head`` on (n, size, …), or with ``draws`` ``f(heads, std=, generator=)``; None if heads can
            only be shared by linear maps.
        share: ``f(grams, moments, owner) -> Sharing`` for values and for keys that nothing rotates; None if heads can
            only be pooled.
        share_rotary: ``f(grams, moments, owner, pairs=, dim=) -> Sharing`` for keys under RoPE.
        draws: whether ``pool`` draws random numbers.
        norms: name of the method that pools parameters no linear map passes through, such as the scales of a norm.
        candidate: whether calibration tries the method for each layer.
        handicap: factor on a candidate's held-out error. One layer's error is not the model's loss: a method that is
            chosen only if it is clearly better has more than 1.
    """

    name: str
    summary: str
    pool: str | None = None
    share: str | None = None
    share_rotary: str | None = None
    draws: bool = False
    norms: str = "mean"
    candidate: bool = False
    handicap: float = 1.0

    def __post_init__(self) -> None:
        if self.pool is None and (self.share is None or self.share_rotary is None):
            raise ValueError(f"merge method {self.name!r} neither pools heads nor shares keys and values")
        if self.candidate and self.share is None:
            raise ValueError(f"merge method {self.name!r} cannot be a candidate: it has no linear form")

    @property
    def linear_only(self) -> bool:
        """Whether queries and outputs have to absorb linear maps: heads cannot be pooled tensor by tensor."""
        return self.pool is None

    def function(self, role: str) -> Callable[..., Any]:
        """The function of ``"pool"``, ``"share"`` or ``"share_rotary"``.

        Raises:
            ValueError: the method has none.
        """
        reference = getattr(self, role)
        if reference is None:
            raise ValueError(f"merge method {self.name!r} has no function to {role.replace('_', ' ')}")
        module, _, name = reference.partition(":")
        return getattr(importlib.import_module(f".{module}", __package__), name)


METHODS: dict[str, MergeMethod] = {
    method.name: method
    for method in (
        MergeMethod(
            "mean",
            "mean-pool the heads of a group (the paper's)",
            pool="pool:mean",
            share="sharing:mean_sharing",
            share_rotary="sharing:mean_sharing",
            candidate=True,
            handicap=1.05,
        ),
        MergeMethod(
            "first",
            "keep the first head of a group (the paper's ablation)",
            pool="pool:first",
            share="sharing:first_sharing",
            share_rotary="sharing:first_sharing",
            norms="first",
            candidate=True,
            handicap=1.05,
        ),
        MergeMethod("random", "draw a fresh head (the paper's ablation)", pool="pool:random", draws=True),
        MergeMethod(
            "lowrank",
            "the shared head that loses the least energy",
            share="lowrank:low_rank",
            share_rotary="rotary:rotary_low_rank",
            candidate=True,
        ),
        MergeMethod(
            "procrustes",
            "rotate heads onto their common mean, then average",
            share="procrustes:procrustes",
            share_rotary="rotary:rotary_procrustes",
            candidate=True,
            handicap=1.05,
        ),
    )
}


def method(name: str) -> MergeMethod:
    """The method of this name.

    Raises:
        ValueError: there is none; plans are checked before they are carried out.
    """
    if name not in METHODS:
        raise ValueError(f"{name!r} is not a merge method; there are {', '.join(METHODS)}")
    return METHODS[name]
