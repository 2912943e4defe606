"""What people do with a checkpoint, as eight functions; each command of ``regroup`` is a thin layer over one of them.

======== ==================================================================
inspect  where the heads are, and what the KV cache costs
advise   how many KV heads: memory, time and loss of every number of them
plan     the number of KV heads of each layer, as data that can be edited
convert  a checkpoint with fewer KV heads
verify   whether a converted checkpoint is what its plan says
evaluate the loss on held-out text, and the distance from a teacher
uptrain  continued pre-training, or distillation, of a converted checkpoint
export   the form that transformers, vLLM or llama.cpp reads
======== ==================================================================

Each is imported when it is first used, so that importing this module takes no time.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .advice.run import advise
    from .conversion.convert import convert
    from .conversion.plan import plan
    from .evaluation.run import evaluate
    from .exports.run import export
    from .inspection import inspect
    from .uptraining.run import uptrain
    from .verification import verify

__all__ = ["advise", "convert", "evaluate", "export", "inspect", "plan", "uptrain", "verify"]

# The module of each function.
_SOURCES = {
    "advise": "advice.run",
    "convert": "conversion.convert",
    "evaluate": "evaluation.run",
    "export": "exports.run",
    "inspect": "inspection",
    "plan": "conversion.plan",
    "uptrain": "uptraining.run",
    "verify": "verification",
}


def __getattr__(name: str) -> Any:
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(importlib.import_module(f".{_SOURCES[name]}", __package__), name)
    return value


def __dir__() -> list[str]:
    return __all__
