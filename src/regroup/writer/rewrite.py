"""What changes with the KV heads: from a layer, its plan and the parent's tensors to the child's tensors."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from ..checkpoint.dtypes import TORCH_DTYPES
from ..layout.types import AttentionLayer, HeadSlot, TensorInfo
from ..merge import first, mean, random
from ..plans import LINEAR_METHODS, LayerPlan, key_value_sources
from ..solver.heads import HeadWeights, Read, share
from ..solver.moments import weight_moments
from ..solver.solve import solve_keys, solve_values

# (n, size, …) and the number of the child's head to (size, …).
Rule = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Move:
    """Where each head of one slot of the child comes from.

    Attributes:
        parent, child: the slot before and after.
        sources: for each head of the child, the parent's heads that it is made of.
        rule: makes one head of several; not asked where there is only one.
    """

    parent: HeadSlot
    child: HeadSlot
    sources: tuple[tuple[int, ...], ...]
    rule: Rule


@dataclass(frozen=True)
class Rewrite:
    """How to make one tensor of the child.

    Attributes:
        shape, dtype: of the result; the dtype is the parent's, by its safetensors name.
        moves: they cover the head axis completely.
        reads: the parent's tensors that are read.
    """

    shape: tuple[int, ...]
    dtype: str
    moves: tuple[Move, ...]
    reads: tuple[str, ...]

    def run(self, name: str, read: Read) -> torch.Tensor:
        """Read, merge, and return the tensor of this name."""
        parents = {tensor: read(tensor) for tensor in self.reads}
        out = torch.empty(self.shape, dtype=next(iter(parents.values())).dtype)
        for move in self.moves:
            heads = [move.child.tensors().index(name)] if "{head}" in move.child.tensor else range(move.child.heads)
            for head in heads:
                blocks = [_block(parents, move.parent, source) for source in move.sources[head]]
                merged = blocks[0] if len(blocks) == 1 else move.rule(torch.stack(blocks), head)
                out.narrow(move.child.axis, move.child.start(head), move.child.size).movedim(move.child.axis, 0).copy_(
                    merged
                )
        return out


class Change(Protocol):
    """How a tensor of the child is made."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def run(self, name: str, read: Read) -> torch.Tensor: ...


class Solver:
    """Shares one layer's heads from its weights alone, once, however many tensors and threads ask for parts of it."""

    def __init__(self, layer: AttentionLayer, want: LayerPlan) -> None:
        self.layer, self.want = layer, want
        self._lock = threading.Lock()
        self._made: dict[str, torch.Tensor] = {}

    def changes(self, moved: Mapping[str, Change], tensors: Mapping[str, TensorInfo]) -> dict[str, Change]:
        """A change for each projection's tensor, of the shape that moving its heads would give it."""
        slots = [slot for p in self.layer.projections().values() for slot in (p.weight, p.bias) if slot is not None]
        return {
            slot.tensor: Solved(moved.get(slot.tensor, tensors[slot.tensor]).shape, tensors[slot.tensor].dtype, self)
            for slot in slots
        }

    def take(self, name: str, read: Read) -> torch.Tensor:
        """One solved tensor, in float32; solving happens when the first is asked for."""
        with self._lock:
            if name not in self._made:
                self._made = self._solve(read)
            return self._made.pop(name)

    def _solve(self, read: Read) -> dict[str, torch.Tensor]:
        layer, want = self.layer, self.want
        weights = HeadWeights.read(layer, read)
        groups = want.num_key_value_heads
        moments = weight_moments(weights, want.order, groups)
        keys = solve_keys(want.key_method, layer, moments, want.order, groups)
        values = solve_values(want.value_method, layer, weights, moments, want.order, groups)
        return share(weights, want.order, keys, values).tensors(layer.with_kv_heads(groups))


@dataclass(frozen=True)
class Solved:
    """A tensor of the child that a solver makes."""

    shape: tuple[int, ...]
    dtype: str
    solver: Solver

    def run(self, name: str, read: Read) -> torch.Tensor:
        """Solve if need be, and round to the dtype that is stored."""
        return self.solver.take(name, read).to(TORCH_DTYPES[self.dtype])


@dataclass(frozen=True)
class Given:
    """A tensor of the child that was made beforehand and lies in a file of its own."""

    shape: tuple[int, ...]
    dtype: str
    path: Path

    def run(self, name: str, read: Read) -> torch.Tensor:
        """Load the tensor of this name."""
        del read  # nothing of the parent is needed
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(name)


def rewrites(
    layer: AttentionLayer,
    want: LayerPlan,
    tensors: Mapping[str, TensorInfo],
    *,
    std: float,
    seed: int,
) -> tuple[dict[str, Change], set[str]]:
    """Everything that one layer's conversion changes.

    Args:
        layer: of the parent.
        want: what is wanted of it; assumed to be checked.
        tensors: dtype and shape of the parent's tensors.
        std, seed: of the ``random`` rule.

    Returns:
        Name to rewrite for every tensor that changes, and the names of tensors that the child no longer has.
    """
    if not want.changes:
        return {}, set()
    solver = Solver(layer, want) if {want.key_method, want.value_method} & set(LINEAR_METHODS) else None
    child = layer.with_kv_heads(want.num_key_value_heads)
    reordered = want.order != tuple(range(layer.num_attention_heads))
    own = tuple((head,) for head in want.order)
    shared = tuple(
        tuple(heads) for heads in key_value_sources(want.order, layer.num_key_value_heads, want.num_key_value_heads)
    )
    methods = {"key": want.key_method, "value": want.value_method}

    moves: dict[str, list[Move]] = {}
    dropped: set[str] = set()
    for (part, before), after in zip(layer.projections().items(), child.projections().values(), strict=True):
        for old, new in zip(before.slots(), after.slots(), strict=True):
            method = methods.get(part)
            # A fused tensor is rebuilt around its keys and values even where the queries stay in order and in place.
            fused = layer.packing != "separate" and part != "output" and old not in before.extras
            if method is None and not reordered and not fused:
                continue
            rule = _rule(
                method or "mean", norm=old in before.extras, std=0.0 if old == before.bias else std, seed=seed, slot=old
            )
            for tensor in new.tensors():
                moves.setdefault(tensor, []).append(Move(old, new, own if method is None else shared, rule))
            dropped |= set(old.tensors()) - set(new.tensors())
    made: dict[str, Change] = {name: rewrite_of(name, parts, tensors) for name, parts in moves.items()}
    if solver is not None:
        made |= solver.changes(made, tensors)
    return made, dropped


def rewrite_of(name: str, moves: list[Move], tensors: Mapping[str, TensorInfo]) -> Rewrite:
    """The rewrite of one tensor of the child, which the moves fill, from a parent with these tensors."""
    slot = moves[0].child
    shape = list(tensors[name].shape)
    if "{head}" not in slot.tensor:
        shape[slot.axis] = sum(move.child.heads * move.child.size for move in moves)
        reads = (name,)
    else:
        head = slot.tensors().index(name)
        reads = tuple(dict.fromkeys(slot.tensor.format(head=source) for source in moves[0].sources[head]))
    return Rewrite(tuple(shape), tensors[name].dtype, tuple(moves), reads)


def _block(parents: Mapping[str, torch.Tensor], slot: HeadSlot, head: int) -> torch.Tensor:
    """One head of the parent, head axis first: (size, …)."""
    tensor = parents[slot.tensor.format(head=head) if "{head}" in slot.tensor else slot.tensor]
    return tensor.narrow(slot.axis, slot.start(head), slot.size).movedim(slot.axis, 0)


def _rule(method: str, *, norm: bool, std: float, seed: int, slot: HeadSlot) -> Rule:
    if method == "first":
        return lambda heads, _: first(heads)
    # A norm has no fresh start that means anything beside kept queries: it is pooled.
    if method == "mean" or method in LINEAR_METHODS or norm:
        return lambda heads, _: mean(heads)

    def fresh(heads: torch.Tensor, head: int) -> torch.Tensor:
        # Seeded by what it fills, so that neither the order of the work nor the number of workers matters. Keys and
        # values of a fused tensor differ in their offset.
        place = f"{seed}:{slot.tensor}:{slot.offset}:{head}"
        number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little")
        return random(heads, std=std, generator=torch.Generator().manual_seed(number))

    return fresh
