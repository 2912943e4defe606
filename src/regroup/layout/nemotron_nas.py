"""Llama weights under a config that says block by block what it has: Nemotron-NAS, which grew from DeciLM.

vLLM (``DeciLMForCausalLM``) and llama.cpp's converter read it, so a different number of KV heads in each layer can be
served from it. Tensors have Llama's names; only the config differs. ``ffn_mult`` is a multiplier from which every
reader works out the width of the feed-forward layer by the formula of ``width``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import RegroupError
from ..families.numbers import is_natural

MODEL_TYPE = "nemotron-nas"
ARCHITECTURE = "DeciLMForCausalLM"
# Readers round the width up to a multiple of this, and the multiplier to so many decimals.
WIDTH_MULTIPLE = 256
MULTIPLIER_DECIMALS = 6

# What a block may ask for besides grouped attention and a gated feed-forward layer. None of it is Llama's.
_ATTENTION_EXTRAS = (
    "no_op",
    "replace_with_linear",
    "sparsify",
    "window_length",
    "num_sink_tokens",
    "use_prefill_window_in_sink_attention",
    "unshifted_sink",
)
_FFN_EXTRAS = ("no_op", "replace_with_linear", "sparsify")


def width(ffn_mult: float, hidden_size: int) -> int:
    """Width of a feed-forward layer: 2/3 of ``ffn_mult`` times the hidden size, rounded up to a multiple of 256."""
    whole = int(2 * ffn_mult * hidden_size / 3)
    return -(-whole // WIDTH_MULTIPLE) * WIDTH_MULTIPLE


def multiplier(intermediate_size: int, hidden_size: int) -> float | None:
    """The ``ffn_mult`` that gives this width, or None where none does: the width is not a multiple of 256."""
    found = round(3 * intermediate_size / (2 * hidden_size), MULTIPLIER_DECIMALS)
    return found if width(found, hidden_size) == intermediate_size else None


def to_blocks(config: Mapping[str, Any], heads: Sequence[int]) -> dict[str, Any]:
    """A Llama-like config as one with ``block_configs``.

    Args:
        config: of a Llama-like checkpoint; it is not changed.
        heads: KV heads of each layer, from the first.

    Returns:
        A config.json whose layers say ``n_heads_in_group`` and ``ffn_mult``; ``intermediate_size`` in place of the
        latter where no multiplier gives the width.
    """
    width_, hidden = int(config["intermediate_size"]), int(config["hidden_size"])
    mult = multiplier(width_, hidden)
    ffn = {
        "no_op": False,
        "replace_with_linear": False,
        "sparsify": None,
        **({"ffn_mult": mult} if mult is not None else {"intermediate_size": width_}),
    }
    attention = {
        "no_op": False,
        "num_sink_tokens": None,
        "replace_with_linear": False,
        "sparsify": None,
        "unshifted_sink": False,
        "use_prefill_window_in_sink_attention": False,
        "window_length": None,
    }
    left_out = ("auto_map", "regroup", "num_key_value_heads_per_layer")
    H = int(config["num_attention_heads"])
    return {
        **{key: value for key, value in config.items() if key not in left_out},
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        # The blocks count; this is for readers that ask for one number, such as what a cache needs at most.
        "num_key_value_heads": max(heads),
        "block_configs": [{"attention": {**attention, "n_heads_in_group": H // G}, "ffn": dict(ffn)} for G in heads],
    }


def as_llama(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config of a Nemotron-NAS checkpoint as a Llama config with KV heads by layer; any other as it is.

    Raises:
        RegroupError: a block is not a Llama layer (no attention, a linear layer in its place, an attention window), or
            blocks differ in more than their KV heads.
    """
    if config.get("model_type") != MODEL_TYPE:
        return config
    blocks, H, hidden = config.get("block_configs"), config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(H, int) or not isinstance(hidden, int) or not isinstance(blocks, list):
        raise _refused(None, "num_attention_heads, hidden_size and a list of block_configs", "none of a kind")
    if len(blocks) != config.get("num_hidden_layers"):
        raise _refused(None, f"{config.get('num_hidden_layers')} block_configs", len(blocks))
    heads, widths = [], []
    for index, block in enumerate(blocks):
        attention, ffn = (_part(block, name, index) for name in ("attention", "ffn"))
        asked = [f"attention.{key}" for key in _ATTENTION_EXTRAS if attention.get(key)]
        asked += [f"ffn.{key}" for key in _FFN_EXTRAS if ffn.get(key)]
        if asked:
            raise _refused(index, "grouped attention and a feed-forward layer", ", ".join(asked))
        group = attention.get("n_heads_in_group")
        if not is_natural(group) or H % group:
            raise _refused(index, f"n_heads_in_group: a divisor of {H}", repr(group)[:80])
        heads.append(H // group)
        widths.append(_width(ffn, hidden, index))
    if len(set(widths)) > 1:
        other = next(index for index, found in enumerate(widths) if found != widths[0])
        raise _refused(other, f"a feed-forward layer of width {widths[0]}, as in layer 0", widths[other])
    kept = {key: value for key, value in config.items() if key not in ("block_configs", "auto_map")}
    return {
        **kept,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "intermediate_size": widths[0],
        "num_key_value_heads": max(heads),
        "num_key_value_heads_per_layer": heads,
    }


def _part(block: Any, name: str, index: int) -> Mapping[str, Any]:
    part = block.get(name) if isinstance(block, dict) else None
    if not isinstance(part, dict):
        raise _refused(index, f"{name}: {{…}}", repr(part)[:80])
    return part


def _width(ffn: Mapping[str, Any], hidden: int, index: int) -> int:
    size, mult = ffn.get("intermediate_size"), ffn.get("ffn_mult")
    if is_natural(size):
        return size
    if isinstance(mult, (int, float)) and not isinstance(mult, bool) and 0 < mult < 1e6:
        return width(mult, hidden)
    raise _refused(index, "ffn_mult or intermediate_size", f"ffn_mult {mult!r}, intermediate_size {size!r}"[:80])


def _refused(index: int | None, expected: str, got: object) -> RegroupError:
    return RegroupError(
        "a block of this Nemotron-NAS config is not a Llama layer",
        file="config.json",
        layer=None if index is None else f"model.layers.{index}",
        expected=expected,
        got=got,
    )
