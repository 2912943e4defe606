"""A checkpoint's config with the names that transformers reads, and without settings that this machine cannot run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import RegroupError
from ..layout.spelling import as_known

_KERNELS = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal")
# transformers' own classes fail on tuples, and its trainer on settings that the default attention cannot serve.
_OUTPUTS = ("return_dict", "output_attentions", "output_hidden_states")


def spelled(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The config as transformers can read it here, and whether that differs from the given one.

    Raises:
        RegroupError: it contradicts itself (see ``layout.spelling``).
    """
    found = runnable(as_known(config))
    return dict(found), found is not config


def runnable(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config without settings that keep its model from running here and do not concern its weights.

    These are a choice of FlashAttention that is not installed, for which transformers would refuse the model or
    download a kernel and run it, and the default outputs of a call. A config that needs no change comes back as
    the same object; none is changed in place.
    """
    left_out = {key for key in _OUTPUTS if config.get(key) is not None}
    left_out |= {key for key in _KERNELS if isinstance(config.get(key), str) and not _installed(config[key])}
    return {key: value for key, value in config.items() if key not in left_out} if left_out else config


def _installed(implementation: str) -> bool:
    from transformers.utils import import_utils

    available = {
        "flash_attention_2": import_utils.is_flash_attn_2_available,
        "flash_attention_3": import_utils.is_flash_attn_3_available,
        "flash_attention_4": import_utils.is_flash_attn_4_available,
    }
    return implementation not in available or available[implementation]()


def stock_architecture(config: Mapping[str, Any], where: str) -> str:
    """The name of the transformers class that a config asks for, also where it names regroup's class."""
    names = config.get("architectures") or []
    if not names or not isinstance(names, list) or not isinstance(names[0], str):
        raise RegroupError(
            "the config does not name the model's class",
            file=where,
            expected='"architectures": ["LlamaForCausalLM"] or the like',
            got=repr(names)[:120],
            remedy="correct it",
        )
    return names[0].removeprefix("Regroup")
