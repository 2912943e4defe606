"""What a decoding step reads and computes, and the least time that takes: arithmetic on plain numbers alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from ..layout.kv_cache import DTYPE_BYTES, CachedLayer, cached_tokens


class DecodingLayer(CachedLayer, Protocol):
    """And what its arithmetic depends on."""

    @property
    def num_attention_heads(self) -> int: ...


@dataclass(frozen=True)
class Cost:
    """What a part of a step reads from memory, in bytes, and computes, in floating-point operations."""

    nbytes: int
    flops: int

    def floor(self, bandwidth: float, rate: float) -> float:
        """Seconds that it takes at least, at ``bandwidth`` bytes and ``rate`` operations a second: the larger."""
        return max(self.nbytes / bandwidth, self.flops / rate)


@dataclass(frozen=True)
class Experts:
    """The experts of a mixture, over all its layers.

    Attributes:
        parameters: of all experts of all layers.
        number: experts a layer.
        chosen: experts that a token goes through, in each layer.
    """

    parameters: int
    number: int
    chosen: int


@dataclass(frozen=True)
class Weights:
    """What a decoding step reads of a model's weights; the rows of an embedding that it looks up are left out.

    Attributes:
        parameters: read at every step, whatever the batch.
        multiplied: of them, elements of matrices that a token's hidden state is multiplied with.
        experts: read as far as tokens are sent to them; None without a mixture.
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
    """The attention of one layer to ``context`` tokens, one query a sequence: keys and values read once, two products.

    Args:
        heads, kv_heads: H query heads and G KV heads.
        head_dim, value_dim: of keys and of values; the same by default.
        dtype: of the cache.
    """
    width = head_dim + (head_dim if value_dim is None else value_dim)
    elements = batch * kv_heads * context * width
    return Cost(elements * DTYPE_BYTES[dtype], 2 * batch * heads * context * width)


def weights_cost(weights: Weights, *, batch: int, dtype: str) -> Cost:
    """What a step reads of the weights and computes with them, for ``batch`` tokens.

    Of a mixture's experts, those are read that some token is sent to: E · (1 − (1 − k/E)^B) of E are expected for B
    tokens that choose k evenly.
    """
    read, multiplied = float(weights.parameters), float(weights.multiplied)
    if weights.experts is not None:
        share = weights.experts.chosen / weights.experts.number
        read += weights.experts.parameters * (1 - (1 - share) ** batch)
        multiplied += weights.experts.parameters * share
    return Cost(round(read * DTYPE_BYTES[dtype]), round(2 * multiplied * batch))
