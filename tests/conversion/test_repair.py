"""Repairs: coordinates in which inputs are white, distillation that never makes worse, and when it stops."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from helpers import layout_of
from regroup.calibration.layer_converter import position_weights
from regroup.calibration.layer_regression import LayerRegression
from regroup.calibration.layer_runner import LayerRunner
from regroup.calibration.repair import _RIDGES, Regression, _Whitened, distill, refit_output
from regroup.calibration.settings import DistillSettings
from teams import batches

Inputs = dict[str, tuple[Tensor, int]]


class Toy(nn.Module):
    """A linear map in the layout of nn.Linear, (out, in), or of GPT-2's Conv1D, (in, out)."""

    def __init__(self, weight: Tensor, axis: int = 1) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.weight = nn.Parameter(weight.clone() if axis else weight.T.clone(), requires_grad=False)
        self.inner.bias = nn.Parameter(torch.linspace(0.5, 1.5, len(weight)), requires_grad=False)
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.inner.weight
        return x @ (weight.T if self.axis else weight) + self.inner.bias


class Problem:
    """A regression on inputs whose scales differ by a factor of 10 ** spread; the last batches are held out."""

    def __init__(
        self, *, spread: float, batches: int = 84, noise: float = 0.0, axis: int = 1, bias: float = 1.0
    ) -> None:
        chance = torch.Generator().manual_seed(0)
        F, E = 12, 5
        turn = torch.linalg.qr(torch.randn(F, F, generator=chance))[0]
        scales = torch.logspace(0, -spread, F)
        self.inputs = [torch.randn(64, F, generator=chance) * scales @ turn.T for _ in range(batches)]
        self.moments = turn @ torch.diag(scales**2) @ turn.T
        # What is wrong with the weight matters as much in every direction, however little inputs move along it.
        missing = 0.3 * torch.randn(E, F, generator=chance) / scales * scales.square().mean().sqrt() @ turn.T
        start = torch.randn(E, F, generator=chance)
        self.axis, self.module = axis, Toy(start, axis)
        added = bias * self.module.get_parameter("inner.bias")
        targets = [x @ (start + missing).T + added for x in self.inputs]
        self.targets = [y + noise * torch.randn(y.shape, generator=chance) for y in targets]
        self.fit, self.held_out = range(batches - 4), range(batches - 4, batches)

    def loss(self, batch: int) -> Tensor:
        y = self.targets[batch]
        return (self.module(self.inputs[batch]) - y).square().sum() / y.square().sum()

    def run(self, *, white: bool, names: tuple[str, ...] = ("inner.weight",), **settings: Any) -> tuple[float, float]:
        given: Inputs | None = {"inner.weight": (self.moments, self.axis)} if white else None
        return distill(self.module, names, self.loss, self.fit, self.held_out, DistillSettings(**settings), given)

    @torch.no_grad()
    def error(self) -> float:
        return sum(float(self.loss(batch)) for batch in self.held_out) / len(self.held_out)


def moments(F: int, rank: int, seed: int = 0) -> Tensor:
    rows = torch.randn(rank, F, generator=torch.Generator().manual_seed(seed)) * torch.logspace(0, -3, F)
    return rows.T @ rows


@pytest.mark.parametrize("rank", [40, 5, 0])
@pytest.mark.parametrize("axis", [0, 1])
def test_whitening_there_and_back(axis: int, rank: int) -> None:
    """Coordinates are left as they were entered, even if inputs do not fill the space or are nothing."""
    white = _Whitened(moments(9, rank), axis, 0.01)
    weight = torch.randn((9, 4) if axis == 0 else (4, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(white(white.right_inverse(weight)), weight, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(white.right_inverse(white(weight)), weight, rtol=1e-4, atol=1e-4)
    if rank:
        assert not torch.allclose(white(weight), weight, atol=0.1)


@pytest.mark.parametrize("axis", [0, 1])
def test_inputs_are_white_in_those_coordinates(axis: int) -> None:
    """W x = W' (C^{-1/2} x), and the second moment of what W' multiplies is the identity but for the level."""
    C = moments(9, 40).double()
    white = _Whitened(C, axis, 1e-9)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(2))
    coordinates = torch.randn((9, 4) if axis == 0 else (4, 9), generator=torch.Generator().manual_seed(3))
    # What the coordinates multiply: found from the map alone, as its derivative.
    narrow = torch.stack([white(torch.eye(9)[[i]] if axis else torch.eye(9)[:, [i]]).flatten() for i in range(9)])
    product = white(coordinates)
    product = (product if axis else product.T) @ x
    torch.testing.assert_close(product, (coordinates if axis else coordinates.T) @ (narrow @ x), rtol=1e-3, atol=1e-3)
    own = narrow.double() @ (C / C.trace() * 9) @ narrow.double().T
    torch.testing.assert_close(own, torch.eye(9).double(), rtol=1e-2, atol=1e-2)
    assert not torch.allclose(C / C.trace() * 9, torch.eye(9).double(), atol=0.5)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_distilling_returns_plain_parameters(axis: int, white: bool) -> None:
    """The module is as it was but for its numbers: names, shapes, dtypes, no gradients, no parametrizations."""
    problem = Problem(spread=1, axis=axis, bias=0.8)
    before = {name: (p.shape, p.dtype, p.clone()) for name, p in problem.module.named_parameters()}
    names = ("inner.bias", "inner.weight")
    start = problem.error()
    said = problem.run(white=white, names=names)
    assert said[0] == pytest.approx(start)
    assert said[1] == pytest.approx(problem.error(), rel=1e-5)
    assert said[1] < 0.5 * said[0]
    after = dict(problem.module.named_parameters())
    assert sorted(after) == sorted(before)
    for name, parameter in after.items():
        assert type(parameter) is nn.Parameter
        assert (parameter.shape, parameter.dtype) == before[name][:2]
        assert not parameter.requires_grad
        assert not torch.equal(parameter, before[name][2])
    assert not any(parametrize.is_parametrized(module) for module in problem.module.modules())
    assert sorted(problem.module.state_dict()) == sorted(before)


@pytest.mark.parametrize("white", [False, True])
def test_what_is_not_named_is_not_trained(white: bool) -> None:
    problem = Problem(spread=1, bias=0.8)
    weight = problem.module.get_parameter("inner.weight").clone()
    bias = problem.module.get_parameter("inner.bias").clone()
    given: Inputs | None = {"inner.weight": (problem.moments, 1)} if white else None
    distill(problem.module, ["inner.bias"], problem.loss, problem.fit, problem.held_out, DistillSettings(), given)
    assert torch.equal(problem.module.get_parameter("inner.weight"), weight)
    assert not torch.equal(problem.module.get_parameter("inner.bias"), bias)


@pytest.mark.parametrize("white", [False, True])
@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_a_solved_layer_is_never_made_worse(rate: float, white: bool) -> None:
    """From the optimum every step leads away: to the last bit the layer stays, whatever the learning rate."""
    problem = Problem(spread=1, noise=0.5)
    sums = Regression()
    for batch in problem.held_out:
        sums.add(problem.inputs[batch], problem.targets[batch] - problem.module.get_parameter("inner.bias"))
    problem.module.get_parameter("inner.weight").copy_(sums.solve(0.0).T)
    weight = problem.module.get_parameter("inner.weight").clone()
    before, after = problem.run(white=white, learning_rate=rate)
    assert before == after == pytest.approx(problem.error())
    assert torch.equal(problem.module.get_parameter("inner.weight"), weight)
    # The same steps from elsewhere do lead somewhere.
    other = Problem(spread=1, noise=0.5)
    before, after = other.run(white=white, learning_rate=min(rate, 0.05))
    assert after < before


@pytest.mark.parametrize("white", [False, True])
def test_the_best_state_is_kept(white: bool) -> None:
    """A learning rate that ends in disaster: what is returned is the best that a check saw on the way."""
    problem = Problem(spread=1, batches=44)
    seen: list[float] = []
    real = problem.loss

    def loss(batch: int) -> Tensor:
        value = real(batch)
        if batch in problem.held_out:
            seen.append(float(value))
        return value

    given: Inputs | None = {"inner.weight": (problem.moments, 1)} if white else None
    settings = DistillSettings(learning_rate=0.3, patience=99)
    found = distill(problem.module, ["inner.weight"], loss, problem.fit, problem.held_out, settings, given)
    checks = [sum(seen[k : k + 4]) / 4 for k in range(0, len(seen), 4)]
    assert len(checks) == 1 + 8
    assert found == (pytest.approx(checks[0]), pytest.approx(min(checks)))
    assert problem.error() == pytest.approx(min(checks), rel=1e-4)


def test_whitening_helps_where_inputs_are_badly_conditioned() -> None:
    """Where scales differ by a factor of 100 whitened coordinates leave far less; with round inputs all is the same."""
    left = {}
    for spread in (2.0, 0.0):
        for white in (False, True):
            problem = Problem(spread=spread)
            before, after = problem.run(white=white, whitening=1e-5, learning_rate=0.1)
            left[spread, white] = after / before
            assert after < before
    assert left[2.0, True] < 0.25 * left[2.0, False]
    assert left[0.0, True] == pytest.approx(left[0.0, False], rel=0.3)


def test_the_wrong_moments_do_not_help() -> None:
    """It is the inputs' own moments that help, not coordinates of any kind."""
    problem, control = Problem(spread=2), Problem(spread=2)
    control.moments = torch.linalg.inv(problem.moments)
    right = problem.run(white=True, whitening=1e-5, learning_rate=0.1)
    wrong = control.run(white=True, whitening=1e-5, learning_rate=0.1)
    assert right[0] == wrong[0]
    assert right[1] < 0.25 * wrong[1]


@pytest.mark.parametrize(("patience", "steps"), [(0, 10), (2, 20), (99, 40)])
def test_it_stops_when_it_gets_no_better(patience: int, steps: int) -> None:
    """Nothing changes from the first check on: as many more checks are borne as patience says, and then it ends."""
    problem = Problem(spread=1, batches=44)
    trained: list[int] = []
    parameter = problem.module.get_parameter("inner.weight")

    def flat(batch: int) -> Tensor:
        if parameter.requires_grad and batch in problem.fit:
            trained.append(batch)
        return 1 + 0 * parameter.square().sum()

    settings = DistillSettings(patience=patience, checks=8)
    found = distill(problem.module, ["inner.weight"], flat, problem.fit, problem.held_out, settings)
    assert found == (1.0, 1.0)
    # A check is every 5 steps. The first one counts as progress, since there was none before it.
    assert trained == list(range(steps))


def test_it_does_not_stop_while_it_gets_better() -> None:
    """The first checks may be worse than the start; what counts is that each is better than those before it."""
    problem = Problem(spread=1, batches=44)
    values = iter([1.0, *(5.0 - 0.5 * k for k in range(8))])
    trained: list[int] = []
    current = [0.0]

    def falling(batch: int) -> Tensor:
        parameter = problem.module.get_parameter("inner.weight")
        if batch in problem.fit:
            trained.append(batch)
            return 0 * parameter.square().sum()
        if batch == problem.held_out[0]:
            current[0] = next(values)
        return torch.tensor(current[0])

    settings = DistillSettings(patience=0, checks=8)
    found = distill(problem.module, ["inner.weight"], falling, problem.fit, problem.held_out, settings)
    assert trained == list(problem.fit)
    assert found == (1.0, 1.0)


def test_losses_that_are_not_numbers_change_nothing() -> None:
    problem = Problem(spread=1)
    weight = problem.module.get_parameter("inner.weight").clone()
    first: Callable[[int], Tensor] = problem.loss

    def broken(batch: int) -> Tensor:
        return first(batch) * (float("nan") if batch in problem.fit else 1.0)

    before, after = distill(problem.module, ["inner.weight"], broken, problem.fit, problem.held_out, DistillSettings())
    assert before == after
    assert torch.equal(problem.module.get_parameter("inner.weight"), weight)


def test_the_output_is_solved_again_only_if_that_is_better() -> None:
    """Least squares by another routine; a projection that fits the held-out text already stays."""
    problem = Problem(spread=0, noise=0.1, batches=40)
    fit, held_out = Regression(), Regression()
    for batch in range(40):
        target = problem.targets[batch] - problem.module.get_parameter("inner.bias")
        (fit if batch in problem.fit else held_out).add(problem.inputs[batch], target)
    given = problem.module.get_parameter("inner.weight").T
    found = refit_output(fit, held_out, given)
    x, y = (torch.cat([part[batch] for batch in problem.fit]) for part in (problem.inputs, problem.targets))
    bias = problem.module.get_parameter("inner.bias")
    y = y - bias
    best = torch.linalg.lstsq(x.double(), y.double()).solution
    torch.testing.assert_close(found.weights, best, rtol=1e-2, atol=1e-2)
    x, y = (torch.cat([part[batch] for batch in problem.held_out]) for part in (problem.inputs, problem.targets))
    y = y - bias
    left = (y - x @ found.weights.float()).square().sum() / y.square().sum()
    assert found.error == pytest.approx(float(left), rel=1e-4)
    assert found.error < 0.1 * found.error_before
    kept = refit_output(fit, held_out, held_out.solve(0.0))
    assert torch.equal(kept.weights, held_out.solve(0.0))
    assert kept.error == kept.error_before


def ridged(inputs: np.ndarray, targets: np.ndarray, level: float, towards: np.ndarray) -> np.ndarray:
    """Least squares in which rows of their own pull towards given weights."""
    pull = np.sqrt(level) * np.eye(inputs.shape[1])
    return np.linalg.lstsq(np.concatenate([inputs, pull]), np.concatenate([targets, pull @ towards]), rcond=None)[0]


@pytest.mark.parametrize("ridge", [1e-4, 0.1, 10.0])
def test_the_ridge_pulls_towards_given_weights(ridge: float) -> None:
    chance = np.random.default_rng(0)
    # Fewer rows than columns: what the text does not say is taken from the given weights.
    x, y, given = (chance.standard_normal(shape) for shape in ((7, 12), (7, 5), (12, 5)))
    sums = Regression()
    sums.add(torch.from_numpy(x), torch.from_numpy(y))
    level = ridge * np.trace(x.T @ x) / 12
    found = sums.solve(ridge, torch.from_numpy(given))
    np.testing.assert_allclose(found, ridged(x, y, level, given), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(sums.solve(ridge), ridged(x, y, level, np.zeros((12, 5))), rtol=1e-6, atol=1e-8)
    # Along directions that no input has nothing changes.
    blind = np.linalg.svd(x)[2][7:]
    np.testing.assert_allclose(blind @ found.numpy(), blind @ given, atol=1e-8)
    assert not np.allclose(blind @ sums.solve(ridge).numpy(), blind @ given, atol=0.1)


def test_positions_count_by_the_size_of_their_hidden_states() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [0.3, 0.4], [0.0, 0.0]]])
    usual = (12.5 + 0.125) / 3
    torch.testing.assert_close(position_weights(hidden), torch.tensor([[[1 / 12.5], [1 / 0.125], [1 / usual]]]))
    assert torch.isfinite(position_weights(torch.zeros(1, 2, 4))).all()


@pytest.mark.parametrize("name", ["llama", "gpt2", "bart"])
@torch.no_grad()
def test_a_layer_is_fitted_by_weighted_least_squares(name: str, saved: Callable[[str], Path]) -> None:
    """Against rows times the roots of their weights, the padding left out, in another routine."""
    folder, data = saved(name), batches(name, 12)
    for batch in data if "decoder_input_ids" in data[0] else ():
        batch["decoder_attention_mask"] = torch.ones_like(batch["decoder_input_ids"])
        batch["decoder_attention_mask"][1, 8:] = 0
    runner = LayerRunner(folder, layout_of(folder), data)
    layer, student = runner.attention_layers(0)[0], runner.layer(0)
    chance = torch.Generator().manual_seed(1)
    targets = [torch.randn(hidden.shape, generator=chance) for hidden in runner.hidden]
    weights = [position_weights(hidden * torch.linspace(0.1, 9, 12).view(1, 12, 1)) for hidden in runner.hidden]
    fit, held_out = range(10), range(10, 12)

    def rows(numbers: range, weighted: bool) -> tuple[np.ndarray, np.ndarray]:
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in numbers:
            mixed = student.observe(batch, runner.hidden[batch], [layer], whole=False)[0][layer.name].mixed
            module: Any = student.attention(layer).get_submodule(layer.output.weight.tensor.split(".")[-2])
            target = targets[batch] - (0 if getattr(module, "bias", None) is None else module.bias)
            root = weights[batch].sqrt() if weighted else torch.ones(2, 12, 1)
            keep = data[batch].get("decoder_attention_mask", torch.ones(2, 12)).bool()
            parts.append(((mixed * root)[keep], (target * root)[keep]))
        x, y = (torch.cat(part).double().numpy() for part in zip(*parts, strict=True))
        return x, y

    given = torch.randn(rows(fit, True)[0].shape[1], targets[0].shape[-1], generator=chance)
    found: dict[bool, np.ndarray] = {}
    for weighted in (True, False):
        regression = LayerRegression(
            student, [layer], targets, runner.hidden, held_out, weights=weights if weighted else None
        )
        refit, _ = regression.refit(given, fit)
        (x, y), (held_x, held_y) = rows(fit, weighted), rows(held_out, weighted)
        tried = [ridged(x, y, ridge * (x**2).sum() / x.shape[1], given.double().numpy()) for ridge in _RIDGES]
        errors = [((held_y - held_x @ W) ** 2).sum() / (held_y**2).sum() for W in tried]
        best = int(np.argmin(errors))
        found[weighted] = refit.weights.double().numpy()
        np.testing.assert_allclose(found[weighted], tried[best], rtol=1e-2, atol=1e-3)
        assert refit.error == pytest.approx(errors[best], rel=1e-3)
    assert np.abs(found[True] - found[False]).max() > 0.01
