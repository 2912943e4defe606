"""One module per kin group. Facts were read from the transformers classes of the same ``model_type``."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any


def modules() -> Iterator[Any]:
    """Every module next to this one, by name; each has a tuple ``FAMILIES``."""
    for name in sorted(module.name for module in pkgutil.iter_modules(__path__)):
        yield importlib.import_module(f"{__name__}.{name}")
