"""Repairs: distillation that never makes worse, and output projections that are solved again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from helpers import layout_of
from regroup.calibration.layer_converter import position_weights
from regroup.calibration.layer_regression import LayerRegression
from regroup.calibration.layer_runner import LayerRunner
from regroup.calibration.repair import _RIDGES, Regression, distill, refit_output
from regroup.calibration.settings import DistillSettings
from teams import batches


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

    def run(self, *, names: tuple[str, ...] = ("inner.weight",), **settings: Any) -> tuple[float, float]:
        return distill(self.module, names, self.loss, self.fit, self.held_out, DistillSettings(**settings))

    @torch.no_grad()
    def error(self) -> float:
        return sum(float(self.loss(batch)) for batch in self.held_out) / len(self.held_out)


@pytest.mark.parametrize("axis", [0, 1])
def test_distilling_returns_plain_parameters(axis: int) -> None:
    """The module is as it was but for its numbers: names, shapes, dtypes, no gradients."""
    problem = Problem(spread=1, axis=axis, bias=0.8)
    before = {name: (p.shape, p.dtype, p.clone()) for name, p in problem.module.named_parameters()}
    names = ("inner.bias", "inner.weight")
    start = problem.error()
    said = problem.run(names=names)
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
    assert sorted(problem.module.state_dict()) == sorted(before)


def test_what_is_not_named_is_not_trained() -> None:
    problem = Problem(spread=1, bias=0.8)
    weight = problem.module.get_parameter("inner.weight").clone()
    bias = problem.module.get_parameter("inner.bias").clone()
    distill(problem.module, ["inner.bias"], problem.loss, problem.fit, problem.held_out, DistillSettings())
    assert torch.equal(problem.module.get_parameter("inner.weight"), weight)
    assert not torch.equal(problem.module.get_parameter("inner.bias"), bias)


@pytest.mark.parametrize("rate", [1e-3, 10.0])
def test_a_solved_layer_is_never_made_worse(rate: float) -> None:
    """From the optimum every step leads away: to the last bit the layer stays, whatever the learning rate."""
    problem = Problem(spread=1, noise=0.5)
    sums = Regression()
    for batch in problem.held_out:
        sums.add(problem.inputs[batch], problem.targets[batch] - problem.module.get_parameter("inner.bias"))
    problem.module.get_parameter("inner.weight").copy_(sums.solve(0.0).T)
    weight = problem.module.get_parameter("inner.weight").clone()
    before, after = problem.run(learning_rate=rate)
    assert before == after == pytest.approx(problem.error())
    assert torch.equal(problem.module.get_parameter("inner.weight"), weight)
    # The same steps from elsewhere do lead somewhere.
    other = Problem(spread=1, noise=0.5)
    before, after = other.run(learning_rate=min(rate, 0.05))
    assert after < before


def test_every_pass_sees_every_batch_in_another_order() -> None:
    problem = Problem(spread=1, batches=14)
    trained: list[int] = []
    real, weight = problem.loss, problem.module.get_parameter("inner.weight")

    def loss(batch: int) -> Tensor:
        if weight.requires_grad:
            trained.append(batch)
        return real(batch)

    distill(problem.module, ["inner.weight"], loss, problem.fit, problem.held_out, DistillSettings(passes=3))
    assert len(trained) == 30  # nothing that is held out
    passes = [trained[k : k + 10] for k in (0, 10, 20)]
    assert [sorted(each) for each in passes] == [list(problem.fit)] * 3
    assert passes[0] != passes[1] != passes[2]


def test_more_passes_leave_less() -> None:
    left = []
    for passes in (1, 4):
        problem = Problem(spread=1, batches=24)
        before, after = problem.run(passes=passes)
        left.append(after / before)
    assert left[1] < 0.7 * left[0] < 0.7


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
            student, [layer], targets, runner.hidden, runner.hidden, held_out, weights=weights if weighted else None
        )
        refit = regression.refit(given, fit)
        (x, y), (held_x, held_y) = rows(fit, weighted), rows(held_out, weighted)
        tried = [ridged(x, y, ridge * (x**2).sum() / x.shape[1], given.double().numpy()) for ridge in _RIDGES]
        errors = [((held_y - held_x @ W) ** 2).sum() / (held_y**2).sum() for W in tried]
        best = int(np.argmin(errors))
        found[weighted] = refit.weights.double().numpy()
        np.testing.assert_allclose(found[weighted], tried[best], rtol=1e-2, atol=1e-3)
        assert refit.error == pytest.approx(errors[best], rel=1e-3)
    assert np.abs(found[True] - found[False]).max() > 0.01


@pytest.mark.parametrize("name", ["llama", "granite", "gemma2"])
@torch.no_grad()
def test_what_the_stream_lacks_is_asked_of_the_output_alone(name: str, saved: Callable[[str], Path]) -> None:
    """Solved again, the output makes up for it, in its own units; distillation knows the layer's own output alone."""
    folder = saved(name)
    runner = LayerRunner(folder, layout_of(folder), batches(name, 3))
    layer, student = runner.attention_layers(1)[0], runner.layer(1)
    chance = torch.Generator().manual_seed(1)
    targets, converted = ([torch.randn(hidden.shape, generator=chance) for hidden in runner.hidden] for _ in range(2))
    regression = LayerRegression(student, [layer], targets, converted, runner.hidden, range(2, 3))
    own = regression.where_the_original_runs()
    for batch, hidden in enumerate(runner.hidden):
        torch.testing.assert_close(own.target(batch), targets[batch].flatten(0, 1))
        torch.testing.assert_close(
            own.trace(batch).memory, regression_input(student, batch, hidden, layer.name, [layer])
        )
        lacking = (regression.target(batch) - targets[batch].flatten(0, 1)) * (layer.residual_scale or 1.0)
        expected = (hidden - converted[batch]).flatten(0, 1) * (0 if layer.residual_scale is None else 1)
        torch.testing.assert_close(lacking, expected, rtol=1e-4, atol=1e-4)
        assert (lacking.abs().max() > 0.1) == (layer.residual_scale is not None)


def regression_input(student: Any, batch: int, hidden: Tensor, name: str, layers: list[Any]) -> Tensor:
    return student.observe(batch, hidden, layers, whole=False)[0][name].memory
