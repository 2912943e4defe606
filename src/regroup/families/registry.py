"""Finds the families: every module below ``known/`` has a tuple ``FAMILIES``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from . import known
from .family import Family


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


FAMILIES: dict[str, Family] = collected(
    importlib.import_module(f"{known.__name__}.{module.name}").FAMILIES
    for module in sorted(pkgutil.iter_modules(known.__path__), key=lambda module: module.name)
)


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
