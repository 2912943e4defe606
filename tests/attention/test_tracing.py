"""Kernels get only addresses, so tracers, torch.func and subclasses of tensors must be detected."""

from __future__ import annotations

import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from plain_attention import plain
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from regroup.attention import explain, grouped_query_attention
from regroup.attention.cpu import build as cpu_build
from regroup.attention.tracing import constant
from regroup.errors import RegroupError


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """A call that the compiled kernel serves."""
    missing = cpu_build.build().unsupported_reason
    if missing:
        pytest.skip(missing)
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 8, 1, 64), torch.randn(2, 2, 300, 64), torch.randn(2, 2, 300, 64)
    assert explain(query, key, value).backend == "cpu"
    return query, key, value


class Attention(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return grouped_query_attention(query, key, value)


class Subclass(Tensor):
    pass


def error(got: Tensor, query: Tensor, key: Tensor, value: Tensor) -> float:
    return (got.double() - plain(query, key, value)).abs().max().item()


def test_a_negated_view(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value = inputs
    got = grouped_query_attention(query, key._neg_view(), value)
    assert error(got, query, -key, value) < 1e-5
    assert error(got, query, key, value) > 0.1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transformations_of_functions(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    one = torch.vmap(lambda q, k, v: grouped_query_attention(q[None], k[None], v[None])[0])
    assert error(one(*inputs), *inputs) < 1e-5
    found = torch.func.grad(lambda q: grouped_query_attention(q, *inputs[1:]).sum())(inputs[0])
    query = inputs[0].clone().requires_grad_()
    (wanted,) = torch.autograd.grad(plain(query, *inputs[1:]).sum(), query)
    assert torch.allclose(found, wanted, atol=1e-5)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_forward_derivatives_are_not_dropped(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """PyTorch's fused kernel has none, and says so; the reference has."""
    query, key, value = inputs
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(query, query)
        assert explain(dual, key, value).backend == "packed"
        found = forward_ad.unpack_dual(grouped_query_attention(dual, key, value, backend="reference")).tangent
        assert found is not None
        with pytest.raises(NotImplementedError, match="forward AD"):
            grouped_query_attention(dual, key, value)
    step = 1e-3
    wanted = (plain(query * (1 + step), key, value) - plain(query * (1 - step), key, value)) / (2 * step)
    assert torch.allclose(found.double(), wanted, atol=1e-4)


@pytest.mark.parametrize("how", ["jit", "make_fx", "export"])
def test_a_trace_computes(how: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """On other numbers than it was traced with."""
    model: Any = Attention()
    traced: Any
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates jit.trace
        if how == "jit":
            traced = torch.jit.trace(model, inputs, check_trace=False)
        elif how == "make_fx":
            traced = make_fx(model)(*inputs)
        else:
            traced = torch.export.export(model, inputs).module()
    others = tuple(torch.randn_like(tensor) for tensor in inputs)
    got = traced(*others)
    assert error(got, *others) < 1e-5
    assert error(got, *inputs) > 0.1


def test_tensors_without_numbers_have_shapes(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in inputs]
        assert grouped_query_attention(*fake).shape == inputs[0].shape
    assert grouped_query_attention(*fake).shape == inputs[0].shape
    meta = [tensor.to("meta") for tensor in inputs]
    assert grouped_query_attention(*meta).shape == inputs[0].shape


def test_subclasses_stay_what_they_are(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    got = grouped_query_attention(inputs[0].as_subclass(Subclass), *inputs[1:])
    assert type(got) is Subclass
    assert error(got.as_subclass(Tensor), *inputs) < 1e-5


def test_a_window_wider_than_kernels_count_is_none(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    for window in (2**63 - 1, 2**64 + 1):
        for backend in ("cpu", "packed", "reference"):
            assert error(grouped_query_attention(*inputs, window=window, backend=backend), *inputs) < 1e-5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"scale": torch.tensor(1.0)}, "the scale is not a number"),
        ({"softcap": "30"}, "the softcap is not a number"),
        ({"query": torch.ones(1, 2, 3, 8).to_sparse()}, "the query is not a dense tensor"),
        ({"key": torch.nested.as_nested_tensor([torch.ones(2, 3, 8)], layout=torch.jagged)}, "the key is not a dense"),
    ],
)
def test_wrong_types_are_refused(change: dict[str, Any], says: str) -> None:
    tensors = {name: torch.ones(1, 2, 3, 8) for name in ("query", "key", "value")}
    with pytest.raises(RegroupError, match=says):
        grouped_query_attention(**{**tensors, **change})


def test_attention_is_imported_without_the_compiler() -> None:
    """``torch._dynamo`` takes seconds; the mark that constant results get is the one that it looks for."""
    command = "import sys, regroup.attention; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    ours, theirs = constant(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs)
    assert vars(ours)
