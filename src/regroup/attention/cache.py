"""The KV cache of a model: written in place, and passed to attention as a view of its filled part.

Each token is written once and never copied, and attention sees filled slots only. The layers are in
:mod:`regroup.attention.cache_layers`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import Cache, CacheLayerMixin, DummyLayer, get_layer_types_and_kwargs

from ..errors import RegroupError
from .cache_layers import BLOCK, KVLayer, SlidingKVLayer, SlotOrder
from .cache_memory import checked_length

__all__ = ["EncoderDecoderKVCache", "KVCache", "KVLayer", "SlidingKVLayer"]


class KVCache(DynamicCache):
    """A cache to give to a model, or to ``generate``, as ``past_key_values``; see :meth:`for_model`.

    Args:
        layers: one for each attention layer; missing ones are added when they are first used, without a window.
        max_length: tokens that added layers can hold.
        spare: tokens for which added layers reserve memory if there is no ``max_length``.
    """

    def __init__(
        self, layers: list[CacheLayerMixin] | None = None, max_length: int | None = None, spare: int = BLOCK
    ) -> None:
        kept: list[Any] = [] if layers is None else list(layers)
        Cache.__init__(self, layers=kept)
        self.max_length, self.spare = checked_length(max_length), spare

    @staticmethod
    def for_model(model: Any, max_length: int | None = None) -> KVCache | EncoderDecoderKVCache:
        """An empty cache for a model of transformers, or its configuration.

        Every layer allocates its memory when it gets its first token, for the batch size and KV heads of that token,
        which may differ between layers.

        Args:
            model: the model or its ``config``.
            max_length: the most tokens of a decoder sequence: the prompt and all new tokens except the last. Memory is
                allocated once, and any further token raises an error. None: the cache grows by doubling.

        Returns:
            A KVCache, or for encoder-decoders an EncoderDecoderKVCache. Layers with a sliding window keep
            only the window.

        Raises:
            RegroupError: the model has layers that do not cache keys and values.
        """
        config = getattr(model, "config", model)
        decoder = config.get_text_config(decoder=True)
        max_length = checked_length(max_length)
        if getattr(config, "is_encoder_decoder", False):
            types, options = _layer_types(decoder)
            windowed = any(kind != "full_attention" for kind in types)
            # Elsewhere num_hidden_layers counts the encoder's layers.
            layers = _layers(types, options, max_length) if windowed else []
            return EncoderDecoderKVCache(KVCache(layers, max_length), KVCache(spare=0))
        return KVCache(_layers(*_layer_types(decoder), max_length), max_length)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the states (B, G, T, D) of a layer's T new tokens; return the keys and values that they attend to."""
        while len(self.layers) <= layer_idx:
            self.layers.append(KVLayer(self.max_length, self.spare))
        layer: Any = self.layers[layer_idx]
        return layer.update(key_states, value_states)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, given as a negative number, from every layer, or from none if one layer cannot."""
        for layer in self.layers:
            if isinstance(layer, KVLayer):
                layer.length_after(tokens_to_remove)
        super().crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        """Keep tokens that leave a window until :meth:`crop` (assisted generation). They then copy every step."""
        self.layers[:] = [layer.recording() if isinstance(layer, SlidingKVLayer) else layer for layer in self.layers]

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values."""
        return sum(layer.nbytes for layer in self.layers if isinstance(layer, KVLayer))


class EncoderDecoderKVCache(EncoderDecoderCache):
    """One cache for the decoder's tokens and one for the encoder's, which is filled once at its exact size."""

    self_attention_cache: KVCache
    cross_attention_cache: KVCache

    @property
    def nbytes(self) -> int:
        """Bytes allocated for keys and values, of self- and cross-attention."""
        return self.self_attention_cache.nbytes + self.cross_attention_cache.nbytes


def _layer_types(config: Any) -> tuple[list[str], list[dict[str, Any]]]:
    types, options = get_layer_types_and_kwargs(config)
    known = {"full_attention", "sliding_attention", "chunked_attention", "dummy"}
    if not known.issuperset(types):
        raise RegroupError(
            "some layers of the model cache something other than keys and values",
            expected="layers with full or sliding attention",
            got=", ".join(sorted(set(types) - known)),
            remedy="use transformers' own cache: omit past_key_values",
        )
    return types, options


def _layers(types: list[str], options: list[dict[str, Any]], max_length: int | None) -> list[Any]:
    orders: dict[int, SlotOrder] = {}
    made: list[Any] = []
    for kind, option in zip(types, options, strict=True):
        window = option.get("sliding_window")
        if kind == "dummy":
            made.append(DummyLayer())
        elif window is None:
            made.append(KVLayer(max_length))
        else:
            order = orders.setdefault(window, SlotOrder())
            made.append(SlidingKVLayer(window, max_length, order=order))
    return made
