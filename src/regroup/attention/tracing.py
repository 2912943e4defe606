"""Compilers, tracers, transformations and tensor types that a kernel, which gets only addresses, would ignore."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """``torch.compiler.assume_constant_result`` without importing the compiler, which takes seconds."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def unsupported_reason(tensors: Iterable[Tensor]) -> str | None:
    """The reason why a kernel that gets only addresses would compute something wrong, or None.

    Under ``torch.compile`` the kernel is an operator of the graph, which gets plain tensors.
    """
    if torch.compiler.is_compiling():
        return None
    # Neither is public: torch.func's transformations (vmap, jvp), and forward-mode differentiation.
    if _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation is active, and only supports PyTorch's own operators"
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"a {type(tensor).__name__} may store its data elsewhere"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return "a tensor is not strided (sparse, nested, or in oneDNN's layout)"
        if tensor.is_neg():
            return "a tensor is a lazily negated view"
    return None


def is_recorded() -> bool:
    """Whether something records operators, and so must see them instead of kernels.

    ``torch.compile``, ``torch.jit.trace``, or a dispatch mode (``make_fx``, a profiler of operators).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
