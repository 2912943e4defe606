"""Grouped-query attention from multi-head checkpoints (Ainslie et al., EMNLP 2023).

``convert`` turns a checkpoint into a grouped one and ``load`` loads what it wrote; ``detect`` and
``make_plan`` are its steps. Everything is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import grouped_query_attention
    from .attention.cache import KVCache, KVLayer
    from .attention.interface import register
    from .attention.module import GroupedQueryAttention
    from .attention.prepare import prepare_for_inference
    from .checkpoint import open_checkpoint
    from .conversion.convert import convert
    from .errors import RegroupError
    from .exports.run import export_checkpoint
    from .inspection import summarize
    from .layout import Layout, detect
    from .modeling import load
    from .plans import Plan, make_plan

__version__ = "0.1.0"
__all__ = [
    "GroupedQueryAttention",
    "KVCache",
    "KVLayer",
    "Layout",
    "Plan",
    "RegroupError",
    "convert",
    "detect",
    "export_checkpoint",
    "grouped_query_attention",
    "load",
    "make_plan",
    "open_checkpoint",
    "prepare_for_inference",
    "register",
    "summarize",
]

_HOMES = {
    "GroupedQueryAttention": "attention.module",
    "KVCache": "attention.cache",
    "KVLayer": "attention.cache",
    "Layout": "layout",
    "Plan": "plans",
    "RegroupError": "errors",
    "convert": "conversion.convert",
    "detect": "layout",
    "export_checkpoint": "exports.run",
    "grouped_query_attention": "attention",
    "load": "modeling",
    "make_plan": "plans",
    "open_checkpoint": "checkpoint",
    "prepare_for_inference": "attention.prepare",
    "register": "attention.interface",
    "summarize": "inspection",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
