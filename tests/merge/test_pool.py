"""The merge rules as functions of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import steps_apart
from regroup.merge.pool import first, mean, random

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def extremes(dtype: torch.dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    large = info.max / (1 if dtype == torch.float16 else 64)  # bfloat16 is added in float32, which reaches no further
    return torch.tensor([large, -large, info.tiny, info.tiny * info.eps, 1 + info.eps, -0.1, 0], dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [2, 3, 5, 6, 7, 8, 12, 31, 64])
def test_the_mean_of_equal_heads_is_that_head(n: int, dtype: torch.dtype) -> None:
    head = torch.cat([extremes(dtype), torch.randn(500, generator=torch.Generator().manual_seed(n)).to(dtype)])
    assert torch.equal(mean(head.expand(n, -1)), head)
    other = head.expand(n, -1).clone()
    other[-1] += 1
    assert not torch.equal(mean(other), head)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(4, 8), (3, 8, 5), (1, 6, 2)])
def test_the_mean_is_rounded_once(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    heads = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    merged = mean(heads)
    assert (merged.dtype, merged.shape) == (dtype, shape[1:])
    expected = heads.double().mean(0).to(dtype)
    # Sums of 16-bit numbers in float32 are rounded at 2^-24, which can tip a tie; float64 sums in another order.
    if dtype == torch.float64:
        torch.testing.assert_close(merged, expected, atol=1e-15, rtol=1e-14)
    else:
        assert steps_apart(merged, expected) <= (0 if dtype == torch.float32 else 1)


def test_the_mean_does_not_overflow_or_sum_in_half_precision() -> None:
    large = torch.full((5, 3), 60_000.0, dtype=torch.float16)
    assert torch.equal(mean(large), large[0])
    ones = torch.ones(512, 1, dtype=torch.bfloat16)  # a bfloat16 sum of ones stops at 256
    assert torch.equal(mean(ones), ones[0])
    total = torch.zeros(1, dtype=torch.bfloat16)
    for one in ones:
        total += one
    assert total == 256


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 9), width=st.integers(1, 6), seed=st.integers(0, 2**32 - 1), repeat=st.integers(1, 3))
def test_counting_heads_twice_weights_them(n: int, width: int, seed: int, repeat: int) -> None:
    heads = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    assert steps_apart(mean(heads.repeat_interleave(repeat, 0)), mean(heads)) <= 1
    weighted = mean(torch.cat([heads, heads[:1]]))
    torch.testing.assert_close(weighted, (heads.sum(0) + heads[0]) / (n + 1), atol=1e-6, rtol=1e-5)


def test_first_is_a_copy_of_the_first_head() -> None:
    heads = torch.randn(3, 4)
    kept = first(heads)
    assert torch.equal(kept, heads[0])
    kept += 1
    assert not torch.equal(kept, heads[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_random_forgets_the_heads(dtype: torch.dtype) -> None:
    def draw(heads: torch.Tensor, seed: int) -> torch.Tensor:
        return random(heads, std=0.02, generator=torch.Generator().manual_seed(seed))

    heads = torch.randn(3, 50, 40).to(dtype)
    drawn = draw(heads, 7)
    assert (drawn.dtype, drawn.shape) == (dtype, heads.shape[1:])
    assert torch.equal(drawn, draw(torch.zeros_like(heads), 7))
    assert not torch.equal(drawn, draw(heads, 8))
    assert 0.018 < drawn.double().std() < 0.022
    assert drawn.double().mean().abs() < 0.002
