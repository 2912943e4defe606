"""The bytes and operations of a decoding step, and its least possible time: arithmetic on plain numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..layout.kv_cache import DTYPE_BYTES, CachedLayer, cached_tokens


class DecodingLayer(CachedLayer, Protocol):
    """A layer with the number of its query heads."""

    @property
    def num_attention_heads(self) -> int: ...


@dataclass(frozen=True)
class Cost:
    """Bytes that a part of a step reads from memory, and its floating-point operations."""

    nbytes: int
    flops: int

    def floor(self, bandwidth: float, rate: float) -> float:
        """The least time in seconds, at ``bandwidth`` bytes and ``rate`` operations per second."""
        return max(self.nbytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, over all its layers.

    Attributes:
        parameters: the number in all experts of all layers.
        number: experts per layer.
        chosen: experts per token, in each layer.
    """

    parameters: int
    number: int
    chosen: int


@dataclass(frozen=True)
class Weights:
    """The weights that a decoding step reads, without the embedding rows that it looks up.

    Attributes:
        parameters: the number read at every step, for any batch.
        multiplied: the number of those in matrices that multiply a hidden state.
        experts: read if a token uses them; None without a mixture of experts.
    """

    parameters: int
    multiplied: int
    experts: Experts | None = None


def attention_flops(
    layers: Iterable[DecodingLayer], *, context: int, batch: int = 1, encoder_context: int | None = None
) -> int:
    """Floating-point operations of attention in one step: products of queries and keys, sums of values.

    Arguments as of :func:`kv_cache_bytes`.

    Returns:
        4 · Σ_layers H · D · tokens · batch: a multiplication and an addition for each of H · D numbers of each token,
        in the scores and again in the sums. It does not depend on the KV heads; softmax is left out.
    """
    return 4 * batch * sum(
        layer.num_attention_heads * layer.head_dim * cached_tokens(layer, context, encoder_context) for layer in layers
    )  # fmt: skip


def operator_cost(
    *, batch: int, heads: int, kv_heads: int, head_dim: int, context: int, dtype: str, value_dim: int | None = None
) -> Cost:
    """Attention of one layer to ``context`` tokens, one query per sequence: keys and values are read once.

    Args:
        heads, kv_heads: H query heads and G KV heads.
        head_dim, value_dim: of keys and of values; equal by default.
        dtype: of the cache.
    """
    width = head_dim + (head_dim if value_dim is None else value_dim)
    elements = batch * kv_heads * context * width
    return Cost(elements * DTYPE_BYTES[dtype], 2 * batch * heads * context * width)


def weights_cost(weights: Weights, *, batch: int, dtype: str) -> Cost:
    """The cost of a step's linear layers, for ``batch`` tokens.

    Only those experts are read that some token uses: of E experts, E · (1 − (1 − k/E)^B) are expected for B tokens
    that choose k uniformly.
    """
    read, multiplied = float(weights.parameters), float(weights.multiplied)
    if weights.experts is not None:
        share = weights.experts.chosen / weights.experts.number
        read += weights.experts.parameters * (1 - (1 - share) ** batch)
        multiplied += weights.experts.parameters * share
    return Cost(round(read * DTYPE_BYTES[dtype]), round(2 * multiplied * batch))
