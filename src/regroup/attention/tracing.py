"""Compilers, tracers, transformations and kinds of tensors that a kernel, which is given addresses, would not see."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import _functorch  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import forward_ad

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """What ``torch.compiler.assume_constant_result`` does, which would import the compiler: seconds for everybody."""
    function.__dict__["_dynamo_marked_constant"] = True
    return function


def unsupported_reason(tensors: Iterable[Tensor]) -> str | None:
    """Why a kernel that is given addresses would miss what tensors are, or None.

    Under ``torch.compile`` the kernel is an operator of the graph, and the tensors are made plain before it runs.
    """
    if torch.compiler.is_compiling():
        return None
    # Neither is public: torch.func's transformations (vmap, jvp), and forward-mode differentiation.
    if _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func or forward-mode differentiation is at work, and follows PyTorch's own operators alone"
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor) is not nn.Parameter:
            return f"a {type(tensor).__name__} may hold its numbers elsewhere"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return "a tensor's numbers do not lie in rows (sparse, nested, or oneDNN's layout)"
        if tensor.is_neg():
            return "a tensor is a view that is negated when it is read"
    return None


def is_recorded() -> bool:
    """Whether somebody needs to see operators instead of kernels.

    ``torch.compile``, ``torch.jit.trace``, or a dispatch mode (``make_fx``, a profiler of operators).
    """
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )
