"""Dynamic sizes of compilers, exporters and tracers, on which no Python branch may depend.

A size is then a symbol (``torch.compile``, ``torch.export``, ``make_fx``) or, under ``torch.jit.trace``, a number that
holds for the example only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_SYMBOLS = frozenset({torch.SymInt, torch.SymFloat})


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` is recording, which makes every size dynamic."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_exported() -> bool:
    """Whether the graph leaves this process, so that it may contain only PyTorch's own operators."""
    return torch.compiler.is_exporting() or is_traced()


def untraced(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function without ``torch.jit.trace`` recording it: the sizes that it reads are plain numbers."""
    if not is_traced():
        return function(*arguments)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return function(*arguments)
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def is_fixed(*sizes: Any) -> bool:
    """Whether these sizes are static: numbers that are the same whenever the graph runs."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return all(has_static_value(size) for size in sizes)
    return not is_traced() and _SYMBOLS.isdisjoint(map(type, sizes))


def is_certain(condition: Any) -> bool:
    """Whether a comparison of sizes holds for all values of the dynamic ones."""
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)
