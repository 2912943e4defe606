"""From config.json and tensor shapes to a Layout. What is not known is refused; nothing is guessed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import RegroupError
from ..families import FAMILIES, Family, family_for
from ..families.numbers import is_natural, natural
from ..families.reading import (
    clipping,
    declared_kv_heads,
    fixed_order,
    initializer_std,
    keys_normed,
    residual_scale,
    rotary_fraction,
    sliding_window,
    ties,
    unsupported_reason,
)
from ..families.unknown import unknown_family
from .nemotron_nas import as_llama
from .spelling import as_known
from .types import AttentionLayer, HeadSlot, Kind, Layout, Projection, Rotary, TensorInfo, fused_slots
from .weights import Weights

# The key under which a checkpoint written by regroup names its KV heads, module by module.
CONFIG_KEY = "regroup"
CONFIG_FORMAT = 1
# A hostile config must not fill the memory with layers that do not exist.
MAX_LAYERS = 10_000
MAX_HEADS = 10_000


def detect(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo] | None = None) -> Layout:
    """Describe every attention layer of a checkpoint.

    Args:
        config: the parsed ``config.json``.
        tensors: name to dtype and shape, from the safetensors headers; None describes the config alone, without
            checking it against weights.

    Returns:
        The layout. Every slot in it was compared with the shape of its tensor, where there are tensors.

    Raises:
        RegroupError: unknown family, quantised weights, or weights that are not what the config says.
    """
    config = as_llama(as_known(config))
    family = family_for(config)
    if family is None:
        raise unknown_family(config, FAMILIES)
    if (reason := unsupported_reason(config, family)) is not None:
        raise RegroupError(
            f"this {config['model_type']} checkpoint cannot be converted: {reason}",
            file="config.json",
            remedy="start from the unquantised checkpoint" if "quantised" in reason else None,
        )
    reader = _Reader(config, family, tensors)
    layers = tuple(reader.layers())
    if reader.weights is not None:
        reader.weights.check_nothing_else(layers)
    return Layout(
        family=family.stock_type,
        layers=layers,
        hidden_size=reader.hidden,
        dtype=tensors[layers[0].query.weight.tensor].dtype if tensors else None,
        native_kv_heads=family.native,
        encoder_layers=natural(config, (family.encoder_layers,)) if family.encoder_layers else 0,
        tied_embeddings=ties(config, family),
        parameters=sum(math.prod(info.shape) for info in tensors.values()) if tensors else None,
        initializer_std=initializer_std(config, family, reader.hidden),
    )


class _Reader:
    """One pass over one checkpoint: holds what every layer needs to know."""

    def __init__(self, config: Mapping[str, Any], family: Family, tensors: Mapping[str, TensorInfo] | None) -> None:
        self.config, self.family = config, family
        self.H = natural(config, family.heads)
        self.count = natural(config, family.layers)
        for what, count, most in (("layers", self.count, MAX_LAYERS), ("heads", self.H, MAX_HEADS)):
            if count > most:
                raise RegroupError(
                    f"the config names more {what} than any model has",
                    file="config.json",
                    expected=f"at most {most}",
                    got=count,
                )
        self.hidden = natural(config, family.hidden)
        self.D = self._head_dim()
        self.weights = None if tensors is None else Weights(tensors, family, self.hidden, self.count)
        self.prefix = family.prefixes[0] if self.weights is None else self.weights.prefix

    def _head_dim(self) -> int:
        for key in self.family.head_dim:
            if self.config.get(key) is not None:
                return natural(self.config, (key,))
        if self.family.head_dim_default is not None:
            return self.family.head_dim_default
        if self.hidden % self.H:
            raise RegroupError(
                "the hidden size is not a multiple of the number of heads and the config names no head_dim",
                file="config.json",
                got=f"hidden size {self.hidden}, {self.H} heads",
            )
        return self.hidden // self.H

    def layers(self) -> Iterator[AttentionLayer]:
        for index in range(self.count):
            yield self._layer(index, "self", self.family.module.format(i=index))
            if self.family.cross is not None:
                yield self._layer(index, "cross", self.family.cross.format(i=index))

    def _layer(self, index: int, kind: Kind, module: str) -> AttentionLayer:
        family, H, D = self.family, self.H, self.D
        name = self.prefix + module
        G = self._kv_heads(index, module, name)
        axis = 1 if family.conv1d else 0
        if family.fused is not None:
            slots = fused_slots(family.packing, f"{name}.{family.fused}.weight", axis, H, G, D)
            biases = (
                fused_slots(family.packing, f"{name}.{family.fused}.bias", 0, H, G, D)
                if self._has(f"{name}.{family.fused}.bias")
                else (None,) * 3
            )
        else:
            names = (family.query, family.key, family.value)
            counts = (H, G, G)
            slots = tuple(
                HeadSlot(f"{name}.{part}.weight", axis, count, D) for part, count in zip(names, counts, strict=True)
            )
            biases = tuple(
                HeadSlot(f"{name}.{part}.bias", 0, count, D) if self._has(f"{name}.{part}.bias") else None
                for part, count in zip(names, counts, strict=True)
            )
        query_extras = self._extras(name, family.query_norm, H)
        bias_table = f"{name}.{family.position_bias}"
        if kind == "self" and family.position_bias and self._has(bias_table, absent=index == 0):
            query_extras += (HeadSlot(bias_table, 1, H, 1),)
        clip = clipping(self.config, family)
        layer = AttentionLayer(
            name=name,
            module=module,
            index=index,
            kind=kind,
            num_attention_heads=H,
            num_key_value_heads=G,
            head_dim=D,
            packing=family.packing,
            query=Projection(slots[0], biases[0], query_extras),
            key=Projection(slots[1], biases[1], self._extras(name, family.key_norm, G)),
            value=Projection(slots[2], biases[2]),
            output=Projection(HeadSlot(f"{name}.{family.output}.weight", 1 - axis, H, D)),
            rotary=Rotary(family.pairs, int(D * rotary_fraction(self.config, family))) if family.pairs else None,
            window=sliding_window(self.config, family, index),
            fixed_order=fixed_order(family),
            order_group="decoder self-attention" if family.shared_order and kind == "self" else None,
            key_obstacle=clip or ("a norm follows the key projection" if self._normed(name) else None),
            value_obstacle=clip,
            residual_scale=residual_scale(self.config, family) if kind == "self" else None,
        )
        if self.weights is not None:
            self.weights.check_shapes(layer)
        return layer

    def _normed(self, name: str) -> bool:
        """Whether keys pass a norm: the config says so, or the weights hold one."""
        norms = (*self.family.shared_norms, *(norm for norm, _ in self.family.key_norm))
        stored = any(self._has(f"{name}.{norm}".format(head=0)) for norm in norms)
        return stored or keys_normed(self.config, self.family)

    def _has(self, tensor: str, *, absent: bool = False) -> bool:
        return absent if self.weights is None else tensor in self.weights.tensors

    def _extras(self, name: str, norms: tuple[tuple[str, int], ...], heads: int) -> tuple[HeadSlot, ...]:
        return tuple(
            HeadSlot(f"{name}.{norm}", 0, heads, self.D if size == -1 else size)
            for norm, size in norms
            if self._has(f"{name}.{norm}".format(head=0))
        )

    def _kv_heads(self, index: int, module: str, name: str) -> int:
        """KV heads of a layer: as the weights say, and not otherwise than the config says."""
        own = self.config.get(CONFIG_KEY)
        if own is not None:
            table = own.get("num_key_value_heads") if isinstance(own, dict) else None
            if not isinstance(table, dict) or own.get("format") != CONFIG_FORMAT:
                raise RegroupError(
                    "the config's own table of KV heads cannot be read",
                    file="config.json",
                    expected=f'"{CONFIG_KEY}": {{"format": {CONFIG_FORMAT}, "num_key_value_heads": {{module: G}}}}',
                    got=str(own)[:120],
                    remedy="a newer regroup may have written it: upgrade",
                )
            declared = table.get(module)
        else:
            declared = declared_kv_heads(self.config, self.family, self.H, index)
        if declared is not None and (not is_natural(declared) or self.H % declared):
            raise RegroupError(
                "the config names an impossible number of KV heads",
                file="config.json",
                layer=name,
                expected=f"a divisor of {self.H} query heads",
                got=declared,
            )
        if self.weights is not None:
            return self.weights.kv_heads(name, self.H, self.D, declared)
        if declared is None:
            raise RegroupError(
                "the config does not name the number of KV heads",
                file="config.json",
                layer=name,
                expected="num_key_value_heads",
                remedy="add it, or inspect the folder with its weights",
            )
        return declared
