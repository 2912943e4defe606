"""What changes with the KV heads, tensor by tensor: heads are moved, copied, or pooled by a merge method."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch

from ..layout.types import AttentionLayer, HeadSlot, TensorInfo
from ..merge.registry import method
from ..plans import LayerPlan, key_value_sources
from .heads import Read

# Heads (n, size, …) and the number of the new head to that head (size, …).
Rule = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Move:
    """Where each head of one slot comes from.

    Attributes:
        before, after: the slot of the original and of the converted layer.
        sources: for each new head, the original heads that it is made of.
        rule: makes one head of several; not used where there is only one.
    """

    before: HeadSlot
    after: HeadSlot
    sources: tuple[tuple[int, ...], ...]
    rule: Rule


@dataclass(frozen=True)
class Rewrite:
    """How to make one tensor of the converted model by moving and pooling heads.

    Attributes:
        shape, dtype: of the result; the dtype is the original one, by its safetensors name.
        moves: they cover the head axis completely.
        reads: names of the original tensors that are read.
    """

    shape: tuple[int, ...]
    dtype: str
    moves: tuple[Move, ...]
    reads: tuple[str, ...]

    def run(self, name: str, read: Read) -> torch.Tensor:
        """Read, merge, and return the tensor of this name."""
        originals = {tensor: read(tensor) for tensor in self.reads}
        out = torch.empty(self.shape, dtype=next(iter(originals.values())).dtype)
        for move in self.moves:
            slot = move.after
            for head in [slot.tensors().index(name)] if "{head}" in slot.tensor else range(slot.heads):
                blocks = [_block(originals, move.before, source) for source in move.sources[head]]
                merged = blocks[0] if len(blocks) == 1 else move.rule(torch.stack(blocks), head)
                out.narrow(slot.axis, slot.start(head), slot.size).movedim(slot.axis, 0).copy_(merged)
        return out


class Change(Protocol):
    """How a tensor of the converted model is made."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def run(self, name: str, read: Read) -> torch.Tensor: ...


def rewrites(
    layer: AttentionLayer,
    want: LayerPlan,
    tensors: Mapping[str, TensorInfo],
    *,
    std: float,
    seed: int,
) -> tuple[dict[str, Rewrite], set[str]]:
    """Everything that one layer's conversion changes, as it is done where heads are pooled.

    Where heads are solved instead (``solver.solve``), the tensors of the projections are replaced by solved ones of the
    same shapes, and the others, such as norms per head, stay as they are made here.

    Args:
        layer: of the original model.
        want: its plan; assumed to be checked.
        tensors: dtype and shape of the original tensors.
        std, seed: of the method ``random``.

    Returns:
        Name to rewrite for every tensor that changes, and the names of tensors that there are no more.
    """
    if not want.changes:
        return {}, set()
    narrowed = layer.with_kv_heads(want.num_key_value_heads)
    reordered = want.order != tuple(range(layer.num_attention_heads))
    own = tuple((head,) for head in want.order)
    shared = tuple(
        tuple(heads) for heads in key_value_sources(want.order, layer.num_key_value_heads, want.num_key_value_heads)
    )
    methods = {"key": want.key_method, "value": want.value_method}

    moves: dict[str, list[Move]] = {}
    dropped: set[str] = set()
    for (part, before), after in zip(layer.projections().items(), narrowed.projections().values(), strict=True):
        for old, new in zip(before.slots(), after.slots(), strict=True):
            name = methods.get(part)
            # A fused tensor is rebuilt around its keys and values even where the queries stay in order and in place.
            fused = layer.packing != "separate" and part != "output" and old not in before.extras
            if name is None and not reordered and not fused:
                continue
            rule = _rule(
                name or "mean", norm=old in before.extras, std=0.0 if old == before.bias else std, seed=seed, slot=old
            )
            for tensor in new.tensors():
                moves.setdefault(tensor, []).append(Move(old, new, own if name is None else shared, rule))
            dropped |= set(old.tensors()) - set(new.tensors())
    return {name: rewrite_of(name, parts, tensors) for name, parts in moves.items()}, dropped


def rewrite_of(name: str, moves: list[Move], tensors: Mapping[str, TensorInfo]) -> Rewrite:
    """The rewrite of one tensor that these moves fill, given dtypes and shapes of the original tensors."""
    slot = moves[0].after
    shape = list(tensors[name].shape)
    if "{head}" not in slot.tensor:
        shape[slot.axis] = sum(move.after.heads * move.after.size for move in moves)
        reads = (name,)
    else:
        head = slot.tensors().index(name)
        reads = tuple(dict.fromkeys(slot.tensor.format(head=source) for source in moves[0].sources[head]))
    return Rewrite(tuple(shape), tensors[name].dtype, tuple(moves), reads)


def _block(originals: Mapping[str, torch.Tensor], slot: HeadSlot, head: int) -> torch.Tensor:
    """One original head, head axis first: (size, …)."""
    tensor = originals[slot.tensor.format(head=head) if "{head}" in slot.tensor else slot.tensor]
    return tensor.narrow(slot.axis, slot.start(head), slot.size).movedim(slot.axis, 0)


def _rule(name: str, *, norm: bool, std: float, seed: int, slot: HeadSlot) -> Rule:
    """How heads of a slot are pooled. The method is looked up when it is used: in a plan it may still be open."""

    def pooled(heads: torch.Tensor, head: int) -> torch.Tensor:
        chosen = method(name)
        # A linear map passes through neither a norm nor another parameter per head; queries that are kept know no
        # fresh ones either.
        if norm or chosen.pool is None:
            chosen = method(chosen.norms)
        pool = chosen.function("pool")
        if not chosen.draws:
            return pool(heads)
        # Seeded by what it fills, so that neither the order of the work nor the number of workers matters. Keys and
        # values of a fused tensor differ in their offset.
        place = f"{seed}:{slot.tensor}:{slot.offset}:{head}"
        number = int.from_bytes(hashlib.sha256(place.encode()).digest()[:8], "little")
        return pool(heads, std=std, generator=torch.Generator().manual_seed(number))

    return pooled
