"""What one config says, read by the facts of its family (the one that ``family_for`` returns for it)."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .family import Family
from .numbers import flag, natural, number

ALIBI = "ALiBi gives every query head a slope of its own by its number"


def ties(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the output head is the input embedding, as far as the config says."""
    return flag(config, "tie_word_embeddings", family.ties)


def stored_ties(family: Family, names: Collection[str]) -> list[tuple[str, str]]:
    """Pairs of stored tensors, by their names, that are one parameter where the config ties: the output head first."""

    def stored(name: str) -> str | None:
        bare = (name.removeprefix(prefix) for prefix in family.prefixes)
        return next((one for one in (name, *bare) if one in names), None)

    pairs = ((stored(target), stored(source)) for target, source in family.tied)
    return [(target, source) for target, source in pairs if target is not None and source is not None]


def unsupported_reason(config: Mapping[str, Any], family: Family) -> str | None:
    """Why a config describes something that the facts of its family do not, or None."""
    if config.get("quantization_config"):
        return "its weights are quantised"
    return next((reason for key, reason in family.unsupported.items() if config.get(key)), None)


def fixed_order(family: Family) -> str | None:
    """Why query heads may not be reordered, or None."""
    return ALIBI if family.positions == "alibi" else None


def slow_output(config: Mapping[str, Any], family: Family | None) -> bool:
    """Whether transformers sums output projections part by part, which leaves out their biases."""
    parts = config.get("pretraining_tp", 1)
    slow = family is not None and family.slow_output and config.get("slow_but_exact")
    return bool(slow and isinstance(parts, int) and parts > 1)


def keys_normed(config: Mapping[str, Any], family: Family) -> bool:
    """Whether the keys pass a norm, as far as the config says."""
    return family.keys_normed == "always" or (family.keys_normed != "never" and bool(config.get(family.keys_normed)))


def clipping(config: Mapping[str, Any], family: Family) -> str | None:
    """What clips queries, keys and values after their projections, or None."""
    return f"{family.clip} clips every element" if family.clip and config.get(family.clip) else None


def residual_scale(config: Mapping[str, Any], family: Family) -> float | None:
    """Factor with which self-attention is added to the residual stream; None where a norm stands between."""
    if family.residual_normed:
        return None
    key = family.residual_multiplier
    return 1.0 if key is None or config.get(key) is None else number(config, key, 1e6)


def declared_kv_heads(config: Mapping[str, Any], family: Family, heads: int, layer: int) -> int | None:
    """KV heads of a layer that the config names, or None where it leaves them to transformers' default."""
    per_layer = config.get(family.kv_heads_by_layer) if family.kv_heads_by_layer else None
    if isinstance(per_layer, list):
        return per_layer[layer] if layer < len(per_layer) else None
    if family.native == "mqa":
        # Falcon's default is multi-query, GPT-BigCode's too.
        return 1 if config.get("multi_query", True) else heads
    if family.native == "none":
        return heads
    for key in family.kv_heads:
        if config.get(key) is not None:
            return config[key]
    return heads if family.kv_default == "heads" else None


def sliding_window(config: Mapping[str, Any], family: Family, layer: int) -> int | None:
    """Window of a layer in tokens, or None where it attends to everything before it."""
    if config.get("sliding_window") in (None, 0):  # Qwen 2 MoE writes 0 where it has none
        return None
    window, kinds = natural(config, ("sliding_window",)), config.get("layer_types")
    if isinstance(kinds, list) and layer < len(kinds):
        return window if kinds[layer] == "sliding_attention" else None
    if family.window in ("all", "none"):
        return window if family.window == "all" else None
    even = layer % 2 == 0
    if family.window == "even":
        return window if even else None
    if not config.get("use_sliding_window"):
        return None
    upper = layer >= config.get("max_window_layers", 28)
    return window if (upper if family.window == "upper" else even and not upper) else None


def rotary_fraction(config: Mapping[str, Any], family: Family) -> float:
    """Share of each head's dimensions that RoPE rotates."""
    rope = config.get("rope_parameters")
    for place in (rope if isinstance(rope, dict) else {}, config):
        for key in ("partial_rotary_factor", "rotary_pct"):
            if place.get(key) is not None:
                return number(place, key, 1.0)
    return family.rotary_share


def initializer_std(config: Mapping[str, Any], family: Family, hidden: int) -> float:
    """Standard deviation of the family's own fresh key and value projections."""
    if family.initializer_std is None:
        scale = 1.0 if config.get("initializer_factor") is None else number(config, "initializer_factor", 1e6)
        return scale * hidden**-0.5
    for key in ("initializer_range", "init_std"):
        if config.get(key) is not None:
            return number(config, key, 1e6)
    return family.initializer_std
