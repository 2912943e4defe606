"""Whatever ``scaled_dot_product_attention`` takes, drawn at random: its result, dtype and gradients, or a refusal."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from regroup.attention import explain, grouped_query_attention
from regroup.errors import RegroupError

scaled_dot_product_attention: Any = functional.scaled_dot_product_attention
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@st.composite
def calls(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of SDPA: shapes with zeros among them, dtypes that may differ, masks of any broadcastable form."""
    size = st.integers(0, 4)
    groups, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    batch, queries, keys = draw(size), draw(st.integers(0, 6)), draw(st.sampled_from([0, 1, 2, 5, 9, 70]))
    width = draw(st.sampled_from([0, 1, 4, 7, 16]))
    value_width = draw(st.sampled_from([width, width, 3, 0]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def numbers(*shape: int) -> Tensor:
        if len(shape) == 4 and draw(st.booleans()):  # heads beside each other, as a model's projections leave them
            return torch.randn(shape[0], shape[2], shape[1], shape[3], generator=generator).transpose(1, 2)
        return torch.randn(shape, generator=generator)

    one = draw(st.booleans())
    first = draw(st.sampled_from(DTYPES))
    dtypes = [first if one else draw(st.sampled_from(DTYPES)) for _ in range(3)]
    shapes = (
        (batch, groups * group, queries, width), (batch, groups, keys, width), (batch, groups, keys, value_width)
    )  # fmt: skip
    tensors = [numbers(*shape).to(dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    mask = None
    kind = draw(st.sampled_from(["none", "bool", "added"]))
    if kind != "none":
        full = (batch, groups * group, queries, keys)
        form = [size if draw(st.booleans()) else 1 for size in full][draw(st.integers(0, 2)) :]
        mask = torch.rand(form, generator=generator) > 0.4 if kind == "bool" else torch.randn(form, generator=generator)
    autocast = draw(st.sampled_from([None, torch.bfloat16, torch.float16]))
    scale = draw(st.sampled_from([None, -0.7, 0.0, 1]))
    causal = mask is None and queries == keys and draw(st.booleans())
    return {"tensors": tensors, "mask": mask, "autocast": autocast, "scale": scale, "is_causal": causal}


def agrees(call: dict[str, Any], **wrong: Any) -> bool:
    """Whether ours is PyTorch's, forward and backward. ``wrong`` are arguments that ours is given beside the call's."""
    tensors, low = call["tensors"], call["autocast"]
    more = {"is_causal": call["is_causal"], "scale": call["scale"]}
    found: list[Any] = []
    for ours in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        with torch.autocast("cpu", low, enabled=low is not None):
            try:
                if ours:
                    out = grouped_query_attention(*leaves, mask=call["mask"], **{**more, **wrong})
                else:
                    mask = call["mask"]
                    if mask is not None:  # SDPA's kernels want it as large as the scores in some cases
                        mask = mask.expand(*leaves[0].shape[:3], leaves[1].shape[2])
                        if mask.is_floating_point() and (low is None or leaves[0].dtype == torch.float64):
                            mask = mask.to(leaves[0].dtype)  # SDPA refuses others; ours adds what it is given
                    groups = leaves[0].shape[1] // leaves[1].shape[1]
                    repeated = (leaves[0], *(each.repeat_interleave(groups, 1) for each in leaves[1:]))
                    out = scaled_dot_product_attention(*repeated, attn_mask=mask, **more)
            except RegroupError:
                found.append(None)
                continue
            except RuntimeError as error:
                if "dtype" not in str(error):
                    raise
                found.append(None)
                continue
        found.append((out, torch.autograd.grad(out.double().square().sum(), leaves)))
    if None in found:
        return found[0] is found[1]
    (mine, my_gradients), (theirs, their_gradients) = found
    if mine.dtype != theirs.dtype or mine.shape != theirs.shape:
        return False
    bound = TOLERANCE[mine.dtype]
    pairs = [(mine, theirs), *zip(my_gradients, their_gradients, strict=True)]
    # PyTorch's gradient of a row that sees nothing is NaN in some places; there is none.
    return all(
        torch.allclose(a.double(), torch.nan_to_num(b.double()), rtol=bound, atol=bound * (1 if a is mine else 30))
        for a, b in pairs
    )


@settings(max_examples=150, deadline=None, derandomize=True)
@given(calls())
def test_it_is_pytorchs_attention(call: dict[str, Any]) -> None:
    assert agrees(call)


@pytest.mark.parametrize("wrong", [{"scale": 0.9}, {"dropout_p": 0.5}, {"window": 1}], ids=str)
def test_another_attention_is_found(wrong: dict[str, Any]) -> None:
    """Negative control: one argument that differs, and a counterexample is found."""
    torch.manual_seed(0)
    found = find(calls(), lambda call: not agrees(call, **wrong), settings=settings(max_examples=500, derandomize=True))
    assert agrees(found)


SIZES = [(0, 3, 5, 8, 8), (1, 0, 5, 8, 8), (1, 3, 0, 8, 8), (1, 3, 5, 0, 8), (1, 3, 5, 8, 0), (1, 3, 3, 8, 8)]


@pytest.mark.parametrize("backend", ["auto", "reference", "packed", "dense", "sdpa", "cpu"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_what_is_empty(sizes: tuple[int, ...], backend: str) -> None:
    """No sequence, no query, no key, no width: PyTorch's shapes and zeros, with gradients, whatever serves."""
    batch, queries, keys, width, value_width = sizes
    leaves = [
        torch.randn(shape, requires_grad=True)
        for shape in ((batch, 4, queries, width), (batch, 2, keys, width), (batch, 2, keys, value_width))
    ]
    wanted = scaled_dot_product_attention(*leaves, enable_gqa=True)
    try:
        got = grouped_query_attention(*leaves, backend=backend)
    except RegroupError:
        assert (backend, sizes) == ("cpu", SIZES[-1])  # it has no gradients
        return
    torch.testing.assert_close(got, wanted)
    for mine, theirs in zip(
        torch.autograd.grad(got.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves), strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    with_more = grouped_query_attention(*leaves, is_causal=queries <= keys, window=2, softcap=3.0)
    assert with_more.shape == wanted.shape
    assert bool(wanted.any()) is (0 not in (batch, queries, keys, value_width))


def test_dropout_is_that_of_pytorch() -> None:
    tensors = [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2)]
    for rate in (0, 0.3, np.float64(0.3), 1.0, True):
        found = []
        for attend, more in ((grouped_query_attention, {}), (scaled_dot_product_attention, {"enable_gqa": True})):
            torch.manual_seed(1)
            found.append(attend(*tensors, is_causal=True, dropout_p=float(rate) if more else rate, **more))
        torch.testing.assert_close(found[0], found[1])
    assert explain(*tensors, dropout_p=0.3).backend == "dense"
    with pytest.raises(RegroupError, match="dropout"):
        grouped_query_attention(*tensors, dropout_p=0.3, backend="packed")
    # With a soft cap, on average what it is without dropout; and not the same twice.
    wanted = grouped_query_attention(*tensors, softcap=2.0)
    many = [tensor.repeat(4000, 1, 1, 1) for tensor in tensors]
    dropped = grouped_query_attention(*many, softcap=2.0, dropout_p=0.3).unflatten(0, (4000, 2))
    assert (dropped.mean(0) - wanted).abs().max() < 0.1
    assert not torch.equal(dropped[0], dropped[1])


@pytest.mark.parametrize("window", [np.int64(3), np.int32(3), torch.tensor(3)], ids=repr)
def test_a_window_is_any_whole_number(window: Any) -> None:
    tensors = [torch.randn(2, heads, 6, 8) for heads in (4, 2, 2)]
    found = grouped_query_attention(*tensors, window=window, is_causal=True)
    assert torch.equal(found, grouped_query_attention(*tensors, window=3, is_causal=True))
    assert not torch.equal(found, grouped_query_attention(*tensors, window=2, is_causal=True))
