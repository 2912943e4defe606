"""Configs with older names of types, keys and classes: rewritten to transformers' names, refused where they disagree.

Falcon was published before transformers had it, by code of its own whose config had other names (``RefinedWebModel``
for what became Falcon's first decoder architecture, ``RefinedWeb`` for the one with grouped heads). transformers
ignores those names and would build another model. Facts were read from that code and transformers' ``FalconConfig``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RegroupError
from ..families import FAMILIES

# What the old code called Falcon's keys.
_FALCON = {"n_head": "num_attention_heads", "n_layer": "num_hidden_layers", "n_head_kv": "num_kv_heads"}
_FALCON_TYPES = ("RefinedWeb", "RefinedWebModel")
# What the old code assumed where the config did not say, which is not what transformers assumes.
_OLD_DEFAULTS = {"multi_query": False, "parallel_attn": False, "alibi": False, "bias": False}

# What classes were called when checkpoints of them were published.
_CLASSES = {
    "T5WithLMHeadModel": "T5ForConditionalGeneration",
    "LLaMAForCausalLM": "LlamaForCausalLM",
    "GPTBigCodeLMHeadModel": "GPTBigCodeForCausalLM",
}


def as_known(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config with the names that transformers knows; any other as it is.

    Nothing is changed in place, and a config that needs no change comes back as the same object.

    Raises:
        RegroupError: two keys that mean the same differ, or one is there that transformers does not read.
    """
    if config.get("model_type") in _FALCON_TYPES or (
        config.get("model_type") == "falcon" and any(key in config for key in _FALCON)
    ):
        config = _as_falcon(config)
    names = config.get("architectures")
    if isinstance(names, list) and any(isinstance(name, str) and name in _CLASSES for name in names):
        now = [_CLASSES.get(name, name) if isinstance(name, str) else name for name in names]
        config = {**config, "architectures": now}
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is not None:
        for one, other in family.aliases:
            _agree(config, one, other)
        for old, new in family.old_keys.items():
            _agree(config, old, new)
            if config.get(old) is not None and config.get(new) is None:
                raise RegroupError(
                    "the config has a key of older code, which transformers does not read",
                    file="config.json",
                    expected=new,
                    got=old,
                    remedy=f"rename {old} to {new}, or download the present revision of the checkpoint",
                )
    return config


def _as_falcon(config: Mapping[str, Any]) -> Mapping[str, Any]:
    own = config.get("model_type")
    for old, new in _FALCON.items():
        _agree(config, old, new)
    kv_heads = config.get("n_head_kv")
    grouped = own == "RefinedWeb"
    if own == "falcon":
        # KV heads by number came with the second architecture.
        named = config.get("new_decoder_architecture")
        heads = config.get("n_head", config.get("num_attention_heads"))
        grouped = kv_heads not in (None, 1, heads) if named is None else bool(named)
    elif config.get("new_decoder_architecture", grouped) is not grouped:
        raise _two(f"new_decoder_architecture: {str(grouped).lower()} for {own}", config["new_decoder_architecture"])
    if config.get("apply_residual_connection_post_layernorm"):
        raise RegroupError(
            "transformers' Falcon has no such residual connection",
            file="config.json",
            expected="apply_residual_connection_post_layernorm: false",
            got=True,
            remedy="none: this model runs only with the code that it was published with",
        )
    found = {key: value for key, value in config.items() if key not in _FALCON}
    for old, new in _FALCON.items():
        if config.get(old) is not None:
            found[new] = config[old]
    if own in _FALCON_TYPES:
        found = _OLD_DEFAULTS | found
    found["model_type"] = "falcon"
    if not grouped and kv_heads is not None:
        # The first architecture has no such number: one KV head, or as many as queries.
        only = 1 if found.get("multi_query", True) else found.get("num_attention_heads")
        if kv_heads != only:
            raise _two(f"n_head_kv: {only}, as multi_query says", kv_heads)
        del found["num_kv_heads"]
    found.setdefault("new_decoder_architecture", grouped)
    names = config.get("architectures")
    if isinstance(names, list):
        found["architectures"] = [f"Falcon{n.removeprefix('RW')}" if str(n).startswith("RW") else n for n in names]
    return found


def _two(expected: str, got: object) -> RegroupError:
    return RegroupError(
        "the config names two decoder architectures",
        file="config.json",
        expected=expected,
        got=repr(got)[:80],
        remedy="correct the one that is wrong: model_type, new_decoder_architecture, multi_query or n_head_kv",
    )


def _agree(config: Mapping[str, Any], one: str, other: str) -> None:
    first, second = config.get(one), config.get(other)
    if first is not None and second is not None and first != second:
        raise RegroupError(
            "two keys of the config mean the same and differ",
            file="config.json",
            expected=f"one value for {one} and {other}",
            got=f"{one} {first!r}, {other} {second!r}"[:120],
            remedy="remove the one that is wrong",
        )
