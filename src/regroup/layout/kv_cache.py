"""How large a KV cache is: arithmetic on plain numbers alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

# Bytes per element, by safetensors name and by common name.
DTYPE_BYTES = {
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "F64": 8,
    "F8": 1,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
}

# Common names of the dtypes of a cache, by safetensors name.
_CACHE_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}


def cache_dtype(stored: str | None) -> tuple[str, str]:
    """The dtype in which the KV cache of a checkpoint is counted by default, and its usual name.

    Args:
        stored: dtype of its attention weights (safetensors name); None where that is not known.

    Returns:
        That dtype if a cache can have it, as when the model is loaded with ``dtype="auto"``; else 16 bits.
    """
    if stored in _CACHE_DTYPES:
        return stored, _CACHE_DTYPES[stored]
    return "BF16", "16-bit"


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
        2 · Σ_layers G · D · tokens · batch · bytes per element (paper, section 1: the cache shrinks by H / G).
    """
    total = sum(
        2 * layer.num_key_value_heads * layer.head_dim * cached_tokens(layer, context, encoder_context)
        for layer in layers
    )
    return total * batch * DTYPE_BYTES[dtype or "BF16"]


def cached_tokens(layer: CachedLayer, context: int, encoder_context: int | None) -> int:
    """Tokens that the cache of a layer holds; arguments as of :func:`kv_cache_bytes`."""
    if layer.kind == "cross":
        return context if encoder_context is None else encoder_context
    return context if layer.window is None else min(context, layer.window)
