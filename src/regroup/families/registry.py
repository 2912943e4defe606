"""Finds the families: every module below ``known/`` has a tuple ``FAMILIES``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .family import Family
from .known import modules


def collected(groups: Iterable[tuple[Family, ...]]) -> dict[str, Family]:
    """Families by ``model_type``.

    Raises:
        ValueError: two have the same one.
    """
    found: dict[str, Family] = {}
    for family in (family for group in groups for family in group):
        if family.model_type in found:
            raise ValueError(f"the family {family.model_type} is described twice")
        found[family.model_type] = family
    return found


FAMILIES: dict[str, Family] = collected(module.FAMILIES for module in modules())


def family_for(config: Mapping[str, Any]) -> Family | None:
    """The facts for a config, with what its own switches change; None if the family is unknown."""
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    return None if family is None else family.switched(config)


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a config is of a model with an encoder and a decoder; of an unknown family, as far as the config says."""
    family = family_for(config)
    if family is not None:
        return family.is_encoder_decoder
    return bool(config.get("is_encoder_decoder", "decoder_start_token_id" in config))
