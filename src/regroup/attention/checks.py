"""Checks of the operator's arguments, each by itself and against the others."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..errors import RegroupError
from .sizes import is_certain, is_fixed

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _shape(tensor: Tensor) -> str:
    return "(" + ", ".join(str(size) for size in tensor.shape) + ")"


_FORMS = {
    "query": "(batch, heads, queries, head_dim)",
    "key": "(batch, KV heads, keys, head_dim)",
    "value": "(batch, KV heads, keys, width)",
}


def check_each(query: Tensor, key: Tensor, value: Tensor) -> None:
    """Check that each is a tensor of four dimensions and a supported dtype."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        form = _FORMS[name]
        _check_dense(tensor, name, form)
        if tensor.dim() != 4:
            raise RegroupError(f"the {name} must have four dimensions", tensor=name, expected=form, got=_shape(tensor))
        if tensor.dtype not in DTYPES:
            raise RegroupError(
                f"the dtype of the {name} is not supported",
                tensor=name,
                expected="float32, bfloat16, float16 or float64",
                got=tensor.dtype,
                remedy=f"convert the {name}",
            )


def _check_dense(tensor: Any, name: str, form: str | None = None) -> None:
    if not isinstance(tensor, Tensor):
        raise RegroupError(f"the {name} is not a tensor", tensor=name, expected=form, got=type(tensor).__name__)
    if tensor.is_nested or tensor.layout != torch.strided:
        raise RegroupError(
            f"the {name} is not a dense tensor",
            tensor=name,
            got="a nested tensor" if tensor.is_nested else tensor.layout,
            remedy="give a padded tensor and a mask" if tensor.is_nested else f"convert the {name}",
        )


def _check_shapes(query: Tensor, key: Tensor, value: Tensor, is_certain: Callable[[Any], bool]) -> None:
    for name, tensor in (("key", key), ("value", value)):
        if tensor.dtype != query.dtype:
            raise RegroupError(
                f"query and {name} differ in dtype",
                tensor=name,
                expected=query.dtype,
                got=tensor.dtype,
                remedy="convert one of them, or use torch.autocast, which does so (except for float64)",
            )
        if tensor.device != query.device:
            raise RegroupError(
                f"query and {name} are on different devices",
                tensor=name,
                expected=query.device,
                got=tensor.device,
                remedy=f"move the {name}",
            )
        if is_certain(tensor.shape[0] != query.shape[0]):
            raise RegroupError(
                f"query and {name} differ in batch",
                tensor=name,
                expected=query.shape[0],
                got=tensor.shape[0],
                remedy="expand the smaller one first (an expanded tensor takes no memory)",
            )
    for name, tensor in (("query", query), ("key", key)):
        if is_certain(tensor.shape[1] == 0):
            raise RegroupError(f"the {name} has no heads", tensor=name, expected=_FORMS[name], got=_shape(tensor))
    if is_certain(key.shape[3] != query.shape[3]):
        raise RegroupError(
            "query and key differ in head_dim",
            tensor="key",
            expected=f"{query.shape[3]}, as in the query {_shape(query)}",
            got=f"{key.shape[3]} of {_shape(key)}",
        )
    for which, axis in (("KV heads", 1), ("keys", 2)):
        if is_certain(key.shape[axis] != value.shape[axis]):
            raise RegroupError(
                f"key and value differ in the number of {which}",
                tensor="value",
                expected=f"{key.shape[axis]}, as in the key {_shape(key)}",
                got=f"{value.shape[axis]} of {_shape(value)}",
            )
    if is_certain(query.shape[1] % key.shape[1] != 0):
        raise RegroupError(
            "the query heads do not divide into groups of equal size",
            tensor="key",
            expected=f"a number of KV heads that divides {query.shape[1]}",
            got=key.shape[1],
            remedy="check that heads are the second dimension, (batch, heads, tokens, width)",
        )


def _check_extra(tensor: Tensor | None, name: str, query: Tensor, key: Tensor) -> None:
    """Check a mask or bias."""
    if tensor is None:
        return
    _check_dense(tensor, name)
    may_be_bool = name == "mask"
    if not (tensor.is_floating_point() or (may_be_bool and tensor.dtype == torch.bool)):
        raise RegroupError(
            f"the {name} cannot have this dtype",
            tensor=name,
            expected="bool (True: may attend) or floating (added to scores)" if may_be_bool else "floating",
            got=tensor.dtype,
            remedy="convert a mask of ones and zeros with mask.bool()" if may_be_bool else None,
        )
    if tensor.device != query.device:
        raise RegroupError(
            f"query and {name} are on different devices", tensor=name, expected=query.device, got=tensor.device
        )
    full = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    sizes = (1,) * (4 - tensor.dim()) + tuple(tensor.shape)
    fits = len(sizes) == 4 and not any(
        is_certain(size != 1) and is_certain(size != wanted) for size, wanted in zip(sizes, full, strict=True)
    )
    if not fits:
        remedy = None
        if tuple(tensor.shape) == (full[0], full[3]):
            remedy = f"pass padding of (batch, keys) as {name}[:, None, None, :]"
        elif tensor.dim() == 3 and tensor.shape[0] == full[0]:
            remedy = f"pass a {name} that is the same for all heads as {name}[:, None]"
        raise RegroupError(
            f"the {name} does not match the scores",
            tensor=name,
            expected=f"a shape that broadcasts to (batch, heads, queries, keys) = {full}",
            got=_shape(tensor),
            remedy=remedy,
        )


def check_together(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, bias: Tensor | None, is_causal: Any
) -> tuple[int, int, int, int]:
    """Check tensors against each other. With dynamic sizes, only certain mismatches raise an error.

    Returns:
        H, G, D and Dv.
    """
    # Comparing static sizes directly takes half the time.
    certain = bool if is_fixed(*query.shape, *key.shape, *value.shape) else is_certain
    _check_shapes(query, key, value, certain)
    _check_extra(mask, "mask", query, key)
    _check_extra(bias, "bias", query, key)
    if not isinstance(is_causal, (bool, torch.SymBool)):
        raise RegroupError("is_causal is not True or False", expected="a bool", got=type(is_causal).__name__)
    if is_causal and certain(query.shape[2] > key.shape[2]) and certain(key.shape[2] > 0):
        raise RegroupError(
            "causal attention has more queries than keys: the first queries would see no key",
            tensor="query",
            expected=f"at most {key.shape[2]} queries",
            got=query.shape[2],
            remedy="pass the keys of all tokens, including those of the queries",
        )
    return query.shape[1], key.shape[1], query.shape[3], value.shape[3]


def whole_number(number: Any) -> int | None:
    """The value of a Python or NumPy integer or an integer tensor without dimensions; None for anything else."""
    if isinstance(number, bool):
        return None
    if isinstance(number, (int, torch.SymInt)):
        symbol: Any = number
        return symbol
    if isinstance(number, Tensor) and (number.dim() > 0 or number.dtype == torch.bool or number.is_meta):
        return None
    try:
        return operator.index(number)
    except (TypeError, RuntimeError):
        return None


def checked_number(number: Any, name: str, remedy: str | None = None) -> Any:
    if not isinstance(number, (Real, torch.SymInt, torch.SymFloat)):
        raise RegroupError(
            f"the {name} is not a number", expected="None or a number", got=type(number).__name__, remedy=remedy
        )
    return number


def is_finite(number: Any) -> bool:
    return not is_fixed(number) or math.isfinite(number)
