"""One attention layer's weights, head by head, whatever tensors they lie in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from ..errors import RegroupError
from ..layout.types import AttentionLayer, HeadSlot
from ..merge.sharing import Sharing, owners
from ..plans import group_members

Read = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class HeadWeights:
    """Projections of one layer, the head axis first.

    Attributes:
        query: (H, D, hidden). query_bias: (H, D) or None; likewise below.
        key, value: (G, D, hidden of what they see).
        output: (H, D, hidden): the transposed block that each head's output is multiplied with.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output: torch.Tensor
    query_bias: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    value_bias: torch.Tensor | None = None

    @classmethod
    def read(cls, layer: AttentionLayer, read: Read) -> HeadWeights:
        """Gather a layer's heads from its tensors, in float32 or better."""
        found: dict[str, Any] = {}
        for part, projection in layer.projections().items():
            bias = projection.bias if part != "output" else None
            for name, slot in ((part, projection.weight), (f"{part}_bias", bias)):
                if slot is None:
                    continue
                found[name] = gather(slot, read)
                if not found[name].isfinite().all():
                    raise RegroupError(
                        "a weight is not a finite number",
                        tensor=slot.tensor,
                        layer=layer.name,
                        got=f"NaN or infinity in the {part} projection",
                        remedy="download the checkpoint again, or look for the training step that broke it",
                    )
        return cls(**found)

    def tensors(self, layer: AttentionLayer) -> dict[str, torch.Tensor]:
        """The layer's tensors by name; ``layer`` says where they lie for this number of KV heads."""
        parts: dict[str, list[tuple[HeadSlot, torch.Tensor]]] = {}
        for part, projection in layer.projections().items():
            parts.setdefault(projection.weight.tensor, []).append((projection.weight, getattr(self, part)))
            if projection.bias is not None:
                parts.setdefault(projection.bias.tensor, []).append((projection.bias, getattr(self, f"{part}_bias")))
        return {name: scatter(pieces) for name, pieces in parts.items()}

    def reordered(self, order: tuple[int, ...]) -> HeadWeights:
        """Query heads in another order; keys and values stay."""
        index = torch.tensor(order)
        bias = None if self.query_bias is None else self.query_bias[index]
        return replace(self, query=self.query[index], output=self.output[index], query_bias=bias)


def group_owners(order: tuple[int, ...], kv_heads: int, groups: int) -> list[tuple[list[int], list[int], list[int]]]:
    """For each group: its query heads, its distinct KV heads, and for each query head the place of its KV head."""
    per = len(order) // kv_heads
    return [(members, *owners([head // per for head in members])) for members in group_members(order, groups)]


def share(
    weights: HeadWeights,
    order: tuple[int, ...],
    key: list[Sharing],
    value: list[Sharing],
) -> HeadWeights:
    """The converted heads: shared keys and values, and queries and outputs that absorb what they need.

    Args:
        weights: of the original layer.
        order: of query heads; group g takes the g-th run of them.
        key, value: one sharing per group.
    """
    H, groups = len(order), len(key)
    new: dict[str, list[torch.Tensor]] = {field.name: [] for field in fields(HeadWeights)}
    for (members, distinct, _), k, v in zip(group_owners(order, len(weights.key), groups), key, value, strict=True):
        index, kv = torch.tensor(members), torch.tensor(distinct)
        new["query"].append(k.restore.mT @ weights.query[index].double())
        new["output"].append(v.restore.mT @ weights.output[index].double())
        for name, sharing in (("key", k), ("value", v)):
            stack = getattr(weights, name)[kv].double()
            new[name].append((sharing.reduce @ stack.flatten(0, 1)).unsqueeze(0))
            bias = getattr(weights, f"{name}_bias")
            if bias is not None:
                new[f"{name}_bias"].append((sharing.reduce @ bias[kv].double().flatten()).unsqueeze(0))
        if weights.query_bias is not None:
            new["query_bias"].append((k.restore.mT @ weights.query_bias[index].double().unsqueeze(-1)).squeeze(-1))
    made: dict[str, Any] = {name: torch.cat(parts).float() if parts else None for name, parts in new.items()}
    assert len(made["query"]) == H
    return HeadWeights(**made)


def gather(slot: HeadSlot, read: Read) -> torch.Tensor:
    """Heads of a slot, (heads, size, …), in float32 or better."""
    tensor = read(slot.tensor)
    index = torch.cat([torch.arange(slot.start(head), slot.start(head) + slot.size) for head in range(slot.heads)])
    rows = tensor.index_select(slot.axis, index).movedim(slot.axis, 0)
    wide = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return rows.unflatten(0, (slot.heads, slot.size)).to(wide)


def scatter(pieces: list[tuple[HeadSlot, torch.Tensor]]) -> torch.Tensor:
    """The tensor that holds these heads, (heads, size, …) each; the slots together fill it."""
    slot, heads = pieces[0]
    shape = list(heads.shape[2:])
    shape.insert(slot.axis, sum(s.heads * s.size for s, _ in pieces))
    out = heads.new_empty(shape)
    for slot, heads in pieces:
        for head in range(slot.heads):
            out.narrow(slot.axis, slot.start(head), slot.size).copy_(heads[head].movedim(0, slot.axis))
    return out


def load_into(module: torch.nn.Module, layer: AttentionLayer, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copy a layer's tensors into the attention module that they belong to, in place."""
    with torch.no_grad():
        for name, value in tensors.items():
            module.get_parameter(name.removeprefix(layer.name + ".")).copy_(value)


def projection_tensors(layer: AttentionLayer) -> list[str]:
    """Names of the weights and biases of the four projections."""
    names = {slot.tensor for p in layer.projections().values() for slot in (p.weight, p.bias) if slot is not None}
    return sorted(names)
