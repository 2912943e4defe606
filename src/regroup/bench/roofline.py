"""Bytes of the KV cache, by arithmetic on the layout alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

# Bytes an element, by safetensors name and by the name that people use.
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "F8": 1}


class CachedLayer(Protocol):
    """What the cache of an attention layer depends on."""

    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def window(self) -> int | None: ...


def kv_cache_bytes(
    layers: Iterable[CachedLayer],
    *,
    context: int = 1,
    batch: int = 1,
    encoder_context: int | None = None,
    dtype: str | None = "BF16",
) -> int:
    """Bytes of keys and values that a decoder keeps.

    Args:
        layers: attention layers with their KV heads and head_dim.
        context: tokens in the decoder's cache; a layer with a sliding window keeps at most that many.
        batch: sequences.
        encoder_context: tokens that cross-attention keeps; ``context`` by default.
        dtype: of the cache; None counts 16-bit numbers.

    Returns:
        2 · Σ_layers G · D · tokens · batch · bytes an element (paper, section 1: the cache shrinks by H / G).
    """
    total = 0
    for layer in layers:
        tokens = context
        if layer.kind == "cross":
            tokens = context if encoder_context is None else encoder_context
        elif layer.window is not None:
            tokens = min(context, layer.window)
        total += 2 * layer.num_key_value_heads * layer.head_dim * tokens
    return total * batch * DTYPE_BYTES[dtype or "BF16"]
