"""Grouped-query attention from multi-head checkpoints (Ainslie et al., EMNLP 2023).

The eight functions of ``regroup.api``, from ``inspect`` to ``export``; ``load``, for what they wrote; attention with
grouped heads; and the steps of a conversion. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import advise, convert, evaluate, export, inspect, plan, uptrain, verify
    from .attention import grouped_query_attention
    from .attention.cache import KVCache, KVLayer
    from .attention.interface import register
    from .attention.module import GroupedQueryAttention
    from .attention.prepare import prepare_for_inference
    from .calibration.text import CalibrationText
    from .checkpoint import open_checkpoint
    from .errors import RegroupError
    from .layout import Layout, detect
    from .listener import Listener
    from .modeling import load
    from .plans import Plan, make_plan
    from .uptraining.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "CalibrationText",
    "GroupedQueryAttention",
    "KVCache",
    "KVLayer",
    "Layout",
    "Listener",
    "Plan",
    "Recipe",
    "RegroupError",
    "advise",
    "convert",
    "detect",
    "evaluate",
    "export",
    "grouped_query_attention",
    "inspect",
    "load",
    "make_plan",
    "open_checkpoint",
    "plan",
    "prepare_for_inference",
    "register",
    "uptrain",
    "verify",
]

_MODULES = {
    "CalibrationText": "calibration.text",
    "GroupedQueryAttention": "attention.module",
    "KVCache": "attention.cache",
    "KVLayer": "attention.cache",
    "Layout": "layout",
    "Listener": "listener",
    "Plan": "plans",
    "Recipe": "uptraining.recipe",
    "RegroupError": "errors",
    "detect": "layout",
    "grouped_query_attention": "attention",
    "load": "modeling",
    "make_plan": "plans",
    "open_checkpoint": "checkpoint",
    "prepare_for_inference": "attention.prepare",
    "register": "attention.interface",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES.get(name, 'api')}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
