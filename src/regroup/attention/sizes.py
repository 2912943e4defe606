"""Sizes that compilers, exporters and tracers keep open: no branch of Python may depend on them.

A size is then a symbol (``torch.compile``, ``torch.export``, ``make_fx``) or, under ``torch.jit.trace``, a number that
is true of the example alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_SYMBOLS = frozenset({torch.SymInt, torch.SymFloat})


def is_traced() -> bool:
    """Whether ``torch.jit.trace`` records, which takes every size as open."""
    return not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None


def is_exported() -> bool:
    """Whether the graph leaves this process, so that PyTorch's own operators alone may be in it."""
    return torch.compiler.is_exporting() or is_traced()


def untraced(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function while ``torch.jit.trace`` looks away: what it reads from shapes is a number, and not recorded."""
    if not is_traced():
        return function(*arguments)
    state = torch._C._get_tracing_state()
    torch._C._set_tracing_state(None)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        return function(*arguments)
    finally:
        torch._C._set_tracing_state(state)  # pyright: ignore[reportAttributeAccessIssue]


def is_fixed(*sizes: Any) -> bool:
    """Whether these sizes are numbers, and will be the same whenever the graph runs."""
    if torch.compiler.is_compiling():
        from torch.fx.experimental.symbolic_shapes import has_static_value

        return all(has_static_value(size) for size in sizes)
    return not is_traced() and _SYMBOLS.isdisjoint(map(type, sizes))


def is_certain(condition: Any) -> bool:
    """Whether a comparison of sizes holds whatever the open ones turn out to be; nothing is assumed of them."""
    if torch.compiler.is_compiling() or isinstance(condition, torch.SymBool):
        from torch.fx.experimental.symbolic_shapes import statically_known_true

        return statically_known_true(condition)
    return bool(condition)
