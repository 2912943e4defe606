"""The converted model's config.json."""

from __future__ import annotations

import copy
from typing import Any

from ..errors import RegroupError
from ..families import family_for
from ..families.reading import ties
from ..layout.detect import CONFIG_KEY
from ..layout.nemotron_nas import as_llama
from ..layout.spelling import as_known
from ..layout.types import Layout
from ..modeling import grouped_config
from ..modeling.spelled import stock_architecture
from ..plans import Plan


def is_stock(layout: Layout, plan: Plan) -> bool:
    """True if the transformers class of the family loads the converted model by itself."""
    heads = {layer.num_attention_heads for layer in layout.layers}
    if plan.uniform is None:
        return False
    allowed = {"any": {plan.uniform}, "mqa": {1, *heads}, "none": heads}[layout.native_kv_heads]
    return plan.uniform in allowed


def converted_config(config: dict[str, Any], layout: Layout, plan: Plan) -> dict[str, Any]:
    """The original config with the converted model's KV heads.

    A model that the stock class loads names them where the family does. Any other carries them module by module,
    together with the class that reads them (see ``regroup.modeling``). Remote code of the original is not copied.
    """
    made = copy.deepcopy(dict(as_llama(as_known(config))))
    config = made.copy()
    family = family_for(config)
    assert family is not None
    made["model_type"] = layout.family
    made.pop("auto_map", None)
    if made.pop("num_key_value_heads_per_layer", None) is not None or config["model_type"] != layout.family:
        made["architectures"] = ["LlamaForCausalLM"]
    if not layout.tied_embeddings and ties(config, family) and len(family.tied) == 1:
        # transformers keeps the stored head either way; other engines would put the embedding in its place. In
        # encoder-decoders the key also ties the embeddings of the two sides, which may not be stored one by one.
        made["tie_word_embeddings"] = False
    most = max(layer.num_key_value_heads for layer in plan.layers)
    for key in family.kv_heads:
        made[key] = most

    if not is_stock(layout, plan):
        if layout.native_kv_heads == "mqa":
            made["multi_query"] = False
        if family.per_layer_obstacle is not None:
            raise RegroupError(
                family.per_layer_obstacle,
                expected="the same number in every layer",
                remedy="plan it with --kv-heads alone",
            )
        return grouped_config(made, {x.module: p.num_key_value_heads for x, p in _pairs(layout, plan)})

    made.pop(CONFIG_KEY, None)
    if made.get("architectures"):
        stock_architecture(made, "config.json")  # refuses what is no list of names
        made["architectures"] = [str(name).removeprefix("Regroup") for name in made["architectures"]]
    if layout.native_kv_heads == "mqa":
        if "num_key_value_heads" in made:
            made["num_key_value_heads"] = plan.uniform
        made["multi_query"] = plan.uniform == 1 and layout.layers[0].num_attention_heads > 1
        made |= dict.fromkeys(family.kv_heads_unread, plan.uniform)
    return made


def _pairs(layout: Layout, plan: Plan) -> zip[tuple[Any, Any]]:
    return zip(layout.layers, plan.layers, strict=True)
