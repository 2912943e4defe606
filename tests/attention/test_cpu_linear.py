"""The compiled kernel of linear layers against float64, over shapes that fit none of its blocks."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

from regroup.attention.cpu import linear as cpu_linear
from regroup.attention.cpu.build import unsupported_reason

pytestmark = pytest.mark.skipif(unsupported_reason() is not None, reason=str(unsupported_reason()))


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.no_grad():
        yield


def case(rows: int, outs: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows + 100 * outs + 10_000 * columns)
    shapes = ((rows, columns), (outs, columns), (outs,))
    states, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return states, weight, bias


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 19, 33, 64])
@pytest.mark.parametrize(("outs", "columns"), [(1, 1), (2, 15), (13, 16), (12, 33), (37, 255), (100, 1031), (6, 4100)])
def test_it_is_the_product(rows: int, outs: int, columns: int, dtype: torch.dtype) -> None:
    states, weight, bias = case(rows, outs, columns, dtype)
    exact = states.double() @ weight.double().t() + bias.double()
    assert cpu_linear.serves(states, weight, bias)
    found = cpu_linear.linear(states, weight, bias)
    assert found.dtype == dtype
    # One rounding of an exact sum is half a unit in the last place: up to 2^-8 of it in bfloat16.
    assert error(found, exact) <= (2**-8 * 1.02 if dtype == torch.bfloat16 else 2e-6)
    plain = cpu_linear.linear(states, weight)
    assert error(plain, exact - bias.double()) <= (2**-8 * 1.02 if dtype == torch.bfloat16 else 2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_weight_counts(dtype: torch.dtype) -> None:
    """A changed weight, number of the states or bias shows where it must, and there alone."""
    states, weight, bias = case(9, 29, 67, dtype)
    found = cpu_linear.linear(states, weight, bias)
    for out, column in ((0, 0), (28, 66), (13, 64), (5, 15)):
        other = weight.clone()
        other[out, column] += 8
        changed = (cpu_linear.linear(states, other, bias) != found).any(0)
        assert changed.nonzero().flatten().tolist() == [out]
    other = states.clone()
    other[8, 66] += 8
    assert (cpu_linear.linear(other, weight, bias) != found).any(1).nonzero().flatten().tolist() == [8]
    shifted = cpu_linear.linear(states, weight, bias.roll(1))
    assert (shifted != found).any(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_the_same_in_any_batch_and_on_any_threads(dtype: torch.dtype) -> None:
    states, weight, bias = case(23, 50, 300, dtype)
    whole = cpu_linear.linear(states, weight, bias)
    for some in (1, 2, 3, 5, 16):
        parts = [cpu_linear.linear(part, weight, bias) for part in states.split(some)]
        assert torch.equal(torch.cat(parts), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(cpu_linear.linear(states, weight, bias), whole)
    finally:
        torch.set_num_threads(threads)


def test_views_are_read_as_they_are() -> None:
    states, weight, bias = case(8, 20, 50, torch.float32)
    wide = torch.full((8, 3, 101), float("nan"))
    wide[:, 1, ::2] = torch.nn.functional.pad(states, (0, 1))
    gaps = wide[:, 1, :100:2]
    assert torch.equal(cpu_linear.linear(gaps, weight, bias), cpu_linear.linear(states, weight, bias))
    rows = torch.full((8, 70), float("nan"))
    rows[:, :50] = states
    assert torch.equal(cpu_linear.linear(rows[:, :50], weight), cpu_linear.linear(states, weight))
    cube = states.view(2, 4, 50).transpose(0, 1)
    assert torch.equal(
        cpu_linear.linear(cube, weight), cpu_linear.linear(states, weight).view(2, 4, 20).transpose(0, 1)
    )


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-42])
def test_unusual_numbers_are_carried(value: float) -> None:
    states, weight, _ = case(5, 11, 40, torch.float32)
    states[3, 37] = value
    torch.testing.assert_close(
        cpu_linear.linear(states, weight), linear(states, weight), equal_nan=True, atol=1e-5, rtol=1e-5
    )


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_it_does_not_serve() -> None:
    states, weight, bias = case(4, 6, 8, torch.float32)
    assert cpu_linear.serves(states, weight, bias)
    assert not cpu_linear.serves(states.half(), weight.half(), None)
    assert not cpu_linear.serves(states, weight.bfloat16(), None)
    assert not cpu_linear.serves(states.double(), weight.double(), None)
    assert not cpu_linear.serves(states, torch.randn(8, 6).t(), None)
    assert not cpu_linear.serves(states, weight, torch.randn(12)[::2])
    assert not cpu_linear.serves(states[:0], weight, bias)
    assert not cpu_linear.serves(states.to("meta"), weight.to("meta"), None)
    assert not cpu_linear.serves(torch.randn(cpu_linear.MAX_ROWS + 1, 8), weight, bias)
    # The kernel would read or write beyond the end of these.
    assert not cpu_linear.serves(states, weight[:, :4].contiguous(), None)
    assert not cpu_linear.serves(states, torch.randn(6, 16), None)
    assert not cpu_linear.serves(states, weight, bias[:1])
    assert not cpu_linear.serves(torch.tensor(1.0), weight, None)
    assert not cpu_linear.serves(states.to_mkldnn(), weight, None)
    assert not cpu_linear.serves(torch.nested.nested_tensor([states, states[:2]], layout=torch.strided), weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not cpu_linear.serves(states, weight, bias)
    with torch.enable_grad():
        assert not cpu_linear.serves(states.clone().requires_grad_(), weight, bias)


def test_compilers_see_an_operator() -> None:
    states, weight, bias = case(4, 6, 8, torch.float32)
    wanted = cpu_linear.linear(states, weight, bias)
    graph = make_fx(lambda x: cpu_linear.linear(x, weight, bias))(states)
    assert "cpu_linear" in graph.code
    assert torch.equal(graph(states), wanted)
    compiled = torch.compile(lambda x: cpu_linear.linear(x, weight, bias), fullgraph=True, backend="eager")
    assert torch.equal(compiled(states), wanted)
    torch.library.opcheck(torch.ops.regroup.cpu_linear.default, (states, weight, bias))
