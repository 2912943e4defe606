"""The config of a model with other KV heads or fewer layers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from ..errors import RegroupError
from ..families import family_for
from ..layout import Layout, detect
from ..layout.detect import CONFIG_KEY
from ..layout.spelling import as_known
from ..modeling.expected import default_class
from ..plans import make_plan
from ..writer.converted_config import converted_config


def variant(config: Mapping[str, Any], *, kv_heads: int | None = None, layers: int | None = None) -> dict[str, Any]:
    """A config with other KV heads in every attention layer of the decoder, or with only its first layers.

    Args:
        config: a parsed ``config.json``, stock or written by regroup; not changed.
        kv_heads: G, a divisor of the query heads; it may be more than the config has. None: unchanged.
        layers: of the decoder, and of an encoder. None: all.

    Raises:
        RegroupError: an unknown family, a G that does not divide the query heads, or more layers than there are.
    """
    made = _with_class(copy.deepcopy(dict(as_known(config))))
    layout = detect(made)
    if layers is not None:
        made = _first_layers(made, layout, layers)
        layout = detect(made)
    if kv_heads is None:
        return made
    if kv_heads > min(layer.num_key_value_heads for layer in layout.layers):
        made = _multi_head(made, layout)
        layout = detect(made)
    return converted_config(made, layout, make_plan(layout, kv_heads=kv_heads, method="first"))


def decoder_layers(config: Mapping[str, Any]) -> int:
    """Number of layers of the decoder."""
    family = family_for(config)
    layout = detect(config)
    return len(layout.layers) // (2 if family is not None and family.is_encoder_decoder else 1)


def memory_projections(layout: Layout) -> set[str]:
    """Names of the linear layers for keys and values of the encoder's output, which are not read at each step."""
    return {
        projection.weight.tensor.removesuffix(".weight")
        for layer in layout.layers
        if layer.kind == "cross"
        for projection in (layer.key, layer.value)
    }


def _with_class(config: dict[str, Any]) -> dict[str, Any]:
    """The config with its model class, if it is missing."""
    if not config.get("architectures") and (cls := default_class(config.get("model_type"))) is not None:
        config["architectures"] = [cls.__name__]
    return config


def _first_layers(config: dict[str, Any], layout: Layout, layers: int) -> dict[str, Any]:
    family = family_for(config)
    assert family is not None
    present = decoder_layers(config)
    if not 1 <= layers <= present:
        raise RegroupError(
            "the model does not have that many layers",
            expected=f"1 to {present}",
            got=layers,
            remedy="choose --layers in this range, or omit it",
        )
    kept = [layer for layer in layout.layers if _index(layer.module) < layers]
    for key in (*family.layers, *((family.encoder_layers,) if family.encoder_layers else ())):
        if config.get(key) is not None:
            config[key] = min(layers, config[key]) if key in family.layers else layers
    # Lists with one entry per layer, such as layer_types.
    for key, value in config.items():
        if isinstance(value, list) and len(value) == present and key != "architectures":
            config[key] = value[:layers]
    if isinstance(config.get(CONFIG_KEY), dict):
        heads = config[CONFIG_KEY]["num_key_value_heads"]
        config[CONFIG_KEY] |= {"num_key_value_heads": {layer.module: heads[layer.module] for layer in kept}}
    return config


def _index(module: str) -> int:
    return next(int(part) for part in module.split(".") if part.isdigit())


def _multi_head(config: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """The stock config of the family with as many KV heads as query heads."""
    family = family_for(config)
    assert family is not None
    heads = max(layer.num_attention_heads for layer in layout.layers)
    for key in (CONFIG_KEY, "num_key_value_heads_per_layer", "auto_map"):
        config.pop(key, None)
    if config["model_type"] != family.stock_type:
        config["model_type"] = family.stock_type
        config["architectures"] = [default_class(family.stock_type).__name__]
    config["architectures"] = [name.removeprefix("Regroup") for name in config["architectures"]]
    for key in (*family.kv_heads, *(("num_key_value_heads",) if "num_key_value_heads" in config else ())):
        config[key] = heads
    if family.native == "mqa":
        config["multi_query"] = False
        config |= dict.fromkeys(family.kv_heads_unread, heads)
    return config
