"""The data model: layout, attention layer, projection, head slot.

Dimensions: H query heads, G key/value heads, n = H / G query heads per group, D head_dim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal, Protocol

from ..families.family import Packing

Kind = Literal["self", "cross"]


class TensorInfo(Protocol):
    """What a layout needs to know of a tensor."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class HeadSlot:
    """Where the heads of one projection lie in one tensor, along one axis.

    Head ``h`` occupies ``size`` consecutive indices from
    ``offset + (h // per_block) * block + (h % per_block) * size``. With one block this is a plain run of heads; with G
    blocks of n + 2 heads it is the interleaved layout of GPT-NeoX, BLOOM and Falcon.

    Attributes:
        tensor: its name; ``{head}`` in it stands for the head's number where every head has a tensor of its own.
        axis: the axis along which heads lie.
        heads: how many there are.
        size: indices per head (head_dim, or 1 where heads have an axis to themselves).
        offset, per_block, block: see above, in indices.
    """

    tensor: str
    axis: int
    heads: int
    size: int
    offset: int = 0
    per_block: int = 0
    block: int = 0

    def start(self, head: int) -> int:
        """First index of a head along the axis of its tensor."""
        if "{head}" in self.tensor:
            return 0
        if not self.per_block:
            return self.offset + head * self.size
        return self.offset + (head // self.per_block) * self.block + (head % self.per_block) * self.size

    def tensors(self) -> list[str]:
        """Names of the tensors that this slot lies in."""
        if "{head}" in self.tensor:
            return [self.tensor.format(head=head) for head in range(self.heads)]
        return [self.tensor]


@dataclass(frozen=True)
class Projection:
    """One of query, key, value, output: every tensor of it that has a place for each head.

    Attributes:
        weight: the matrix.
        bias: its bias where that is per head; an output bias is not.
        extras: other parameters per head, such as a norm after the projection or a column of a position-bias table.
    """

    weight: HeadSlot
    bias: HeadSlot | None = None
    extras: tuple[HeadSlot, ...] = ()

    def slots(self) -> Iterator[HeadSlot]:
        yield self.weight
        if self.bias is not None:
            yield self.bias
        yield from self.extras

    def moved(self, weight: HeadSlot) -> Projection:
        """The same projection with its weight elsewhere; a bias is packed as its weight is, along its only axis."""
        bias = None if self.bias is None else replace(weight, tensor=self.bias.tensor, axis=0)
        return replace(self, weight=weight, bias=bias)


@dataclass(frozen=True)
class Rotary:
    """What rotates queries and keys: the layout of pairs and how many dimensions of a head take part."""

    pairs: Literal["half", "interleaved"]
    dim: int


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer whose key/value heads may be grouped.

    Attributes:
        name: the module's full name in the checkpoint, such as ``"model.layers.0.self_attn"``.
        module: the same relative to the base model, such as ``"layers.0.self_attn"``.
        index: number of the decoder layer, from 0.
        kind: self-attention or cross-attention.
        num_attention_heads, num_key_value_heads, head_dim: H, G, D.
        packing: separate tensors; one tensor stacked as [q | k | v]; or interleaved by group as [q × n, k, v].
        query, key, value, output: where the heads are.
        rotary: None where nothing rotates the keys.
        window: sliding-window length in tokens, or None.
        fixed_order: why query heads may not be reordered (ALiBi), or None.
        order_group: layers with the same name here must share one order of query heads, or None.
        key_obstacle, value_obstacle: what keeps a linear map from passing through the keys or values (a norm, a clip),
            or None.
        residual_scale: factor with which the output projection's result is added to the residual stream; None where it
            is normalised first, or in cross-attention, where the residual stream is not available.
    """

    name: str
    module: str
    index: int
    kind: Kind
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    packing: Packing
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    rotary: Rotary | None = None
    window: int | None = None
    fixed_order: str | None = None
    order_group: str | None = None
    key_obstacle: str | None = None
    value_obstacle: str | None = None
    residual_scale: float | None = None

    def with_kv_heads(self, heads: int) -> AttentionLayer:
        """The same layer with another number of key/value heads: where everything lies after conversion."""
        H, D = self.num_attention_heads, self.head_dim

        def narrow(projection: Projection, slot: HeadSlot) -> Projection:
            return replace(
                projection.moved(slot), extras=tuple(replace(extra, heads=heads) for extra in projection.extras)
            )

        if self.packing == "separate":
            query = self.query
            key, value = replace(self.key.weight, heads=heads), replace(self.value.weight, heads=heads)
        else:
            fused = fused_slots(self.packing, self.query.weight.tensor, self.query.weight.axis, H, heads, D)
            query, key, value = self.query.moved(fused[0]), fused[1], fused[2]
        return replace(
            self,
            num_key_value_heads=heads,
            query=query,
            key=narrow(self.key, key),
            value=narrow(self.value, value),
        )

    def projections(self) -> dict[str, Projection]:
        return {"query": self.query, "key": self.key, "value": self.value, "output": self.output}


def fused_slots(
    packing: Packing, tensor: str, axis: int, H: int, G: int, D: int
) -> tuple[HeadSlot, HeadSlot, HeadSlot]:
    """Query, key and value slots of a fused projection.

    ``stacked``: all queries, all keys, all values. ``interleaved``: for each group its n queries, its key, its value,
    which at G = H is the per-head [q, k, v] of GPT-NeoX and BLOOM and at G = 1 the [queries | key | value] of MQA.
    """
    if packing == "stacked":
        return (
            HeadSlot(tensor, axis, H, D),
            HeadSlot(tensor, axis, G, D, offset=H * D),
            HeadSlot(tensor, axis, G, D, offset=(H + G) * D),
        )
    n = H // G
    block = (n + 2) * D
    return (
        HeadSlot(tensor, axis, H, D, per_block=n, block=block),
        HeadSlot(tensor, axis, G, D, offset=n * D, per_block=1, block=block),
        HeadSlot(tensor, axis, G, D, offset=(n + 1) * D, per_block=1, block=block),
    )


@dataclass(frozen=True)
class Layout:
    """What a checkpoint is.

    Attributes:
        family: transformers' ``model_type``.
        layers: the attention layers that can be grouped, in the order of the model.
        hidden_size: width of the residual stream.
        dtype: the dtype that most attention weights are stored in (safetensors name), or None for a config alone.
        native_kv_heads: what the stock transformers class can hold in every layer alike: ``"any"``, ``"mqa"`` (1 or H)
            or ``"none"`` (H only).
        encoder_layers: encoder layers that are left alone: an encoder runs in parallel and reads no cache.
        tied_embeddings: whether input and output embeddings are one tensor.
        parameters: number of weights, or None for a config alone.
        initializer_std: standard deviation of the family's fresh initialisation.
    """

    family: str
    layers: tuple[AttentionLayer, ...]
    hidden_size: int
    dtype: str | None
    native_kv_heads: Literal["any", "mqa", "none"]
    encoder_layers: int = 0
    tied_embeddings: bool = False
    parameters: int | None = None
    initializer_std: float = 0.02

    def fingerprint(self) -> str:
        """Hash of everything that a plan relies on: a plan made for one layout is refused for another."""
        facts = [
            (layer.name, layer.kind, layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim)
            for layer in self.layers
        ]
        return hashlib.sha256(json.dumps([self.family, facts]).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, object]:
        """The whole layout as plain data."""
        return asdict(self)
