"""The config of a model with other KV heads or fewer layers, to be built with random weights."""

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
from ..writer.config import child_config


def variant(config: Mapping[str, Any], *, kv_heads: int | None = None, layers: int | None = None) -> dict[str, Any]:
    """A config with this many KV heads in every attention layer of the decoder, and with its first layers alone.

    Args:
        config: a parsed ``config.json``, stock or written by regroup; not changed.
        kv_heads: G, a divisor of the query heads; more than the config has is fine. None keeps those that it has.
        layers: of the decoder, and of the encoder where there is one. None keeps all.

    Raises:
        RegroupError: an unknown family, a G that does not divide the query heads, or layers that there are not.
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
    return child_config(made, layout, make_plan(layout, kv_heads=kv_heads, method="first"))


def decoder_layers(config: Mapping[str, Any]) -> int:
    """How many layers the decoder has."""
    family = family_for(config)
    layout = detect(config)
    return len(layout.layers) // (2 if family is not None and family.is_encoder_decoder else 1)


def memory_projections(layout: Layout) -> set[str]:
    """Names of the linear layers that make keys and values of the encoder's output: not read again at each step."""
    return {
        projection.weight.tensor.removesuffix(".weight")
        for layer in layout.layers
        if layer.kind == "cross"
        for projection in (layer.key, layer.value)
    }


def _with_class(config: dict[str, Any]) -> dict[str, Any]:
    """A config that names its class, for one that was written by hand."""
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
            remedy="choose a number of --layers among them, or leave the option out",
        )
    kept = [layer for layer in layout.layers if _index(layer.module) < layers]
    for key in (*family.layers, *((family.encoder_layers,) if family.encoder_layers else ())):
        if config.get(key) is not None:
            config[key] = min(layers, config[key]) if key in family.layers else layers
    # What is listed layer by layer, such as layer_types.
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
