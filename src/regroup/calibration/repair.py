"""Repair after merging: the output projection is solved again, or the layer is distilled, on the converted inputs.

The target is the original attention's output, plus what the converted model's residual stream lacks before the layer
where that is known (``AttentionLayer.residual_scale``): a layer makes up for the ones before it as far as it can.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..processes import SINGLE_PROCESS, ProcessGroup
from .settings import DistillSettings

# Strengths of the ridge that are tried, relative to the mean square of the inputs; held-out text chooses. It pulls
# towards the projection that merging gave, which is right for all text, where calibration text says little.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass
class Regression:
    """Sums that a linear regression of outputs (…, E) on inputs (…, F) needs, in float64.

    Attributes:
        gram, cross, square, rows: Σ a aᵀ (F, F), Σ a yᵀ (F, E), Σ |y|², and how many rows.
    """

    gram: torch.Tensor | None = None
    cross: torch.Tensor | None = None
    square: float = 0.0
    rows: int = 0

    def add(self, inputs: torch.Tensor, targets: torch.Tensor) -> None:
        """Count rows (N, F) and (N, E)."""
        gram, cross = (inputs.T @ inputs).double().cpu(), (inputs.T @ targets).double().cpu()
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross
        self.square += float(targets.double().square().sum())
        self.rows += len(inputs)

    def merged(self, processes: ProcessGroup) -> Regression:
        """The sums over the rows of all processes."""
        own = {"square": torch.tensor(self.square, dtype=torch.float64), "rows": torch.tensor(self.rows)}
        own |= {name: value for name in ("gram", "cross") if (value := getattr(self, name)) is not None}
        found = processes.sum_tensors(own)
        return Regression(found.get("gram"), found.get("cross"), float(found["square"]), int(found["rows"]))

    def solve(self, ridge: float, given: torch.Tensor | None = None) -> torch.Tensor:
        """Weights (F, E) that minimise Σ |y - aᵀW|² + ridge · mean(gram) · |W - given|²; ``given`` is 0 unless said."""
        assert self.gram is not None
        assert self.cross is not None
        level = ridge * float(self.gram.diagonal().mean())
        regular = self.gram + max(level, 1e-30) * torch.eye(len(self.gram), dtype=torch.float64)
        if given is None:
            return torch.linalg.solve(regular, self.cross)
        start = given.double()
        return start + torch.linalg.solve(regular, self.cross - self.gram @ start)

    def error(self, weights: torch.Tensor) -> float:
        """Σ |y - aᵀW|² over Σ |y|²."""
        assert self.gram is not None
        assert self.cross is not None
        W = weights.double()
        residual = self.square - 2 * float((W * self.cross).sum()) + float((W * (self.gram @ W)).sum())
        return max(residual, 0.0) / max(self.square, 1e-300)


@dataclass(frozen=True)
class Refit:
    """The best output projection that was found, (F, E), and its held-out error; the given one if none was better."""

    weights: torch.Tensor
    error: float
    error_before: float


def refit_output(fit: Regression, held_out: Regression, given: torch.Tensor) -> Refit:
    """Solve the output projection again by ridge regression, and keep it only if held-out text says so.

    Args:
        fit, held_out: sums over text that does not overlap.
        given: (F, E), the projection to beat.
    """
    before = held_out.error(given)
    best = Refit(given.double(), before, before)
    for ridge in _RIDGES:
        weights = fit.solve(ridge, given)
        error = held_out.error(weights)
        if error < best.error:
            best = Refit(weights, error, before)
    return best


class _Whitened(nn.Module):
    """A weight in the coordinates in which its inputs are white: W = W' C^{-1/2} along the axis of inputs.

    Adam scales every coordinate on its own; where inputs are correlated those are the wrong coordinates. The same idea,
    with the gradients' side as well, is K-FAC (Martens and Grosse 2015).
    """

    def __init__(self, moments: torch.Tensor, axis: int, level: float) -> None:
        super().__init__()
        values, vectors = torch.linalg.eigh(moments.double())
        values = values.clamp(min=0) / values.clamp(min=0).mean().clamp(min=1e-300) + level
        self.axis = axis
        self.narrow: torch.Tensor
        self.widen: torch.Tensor
        self.register_buffer("narrow", ((vectors * values.rsqrt()) @ vectors.T).to(torch.float32))
        self.register_buffer("widen", ((vectors * values.sqrt()) @ vectors.T).to(torch.float32))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.narrow if self.axis else self.narrow @ weight

    def right_inverse(self, weight: torch.Tensor) -> torch.Tensor:
        return weight @ self.widen if self.axis else self.widen @ weight


def distill(
    module: nn.Module,
    names: Sequence[str],
    loss_of: Callable[[int], torch.Tensor],
    fit: Sequence[int],
    held_out: Sequence[int],
    settings: DistillSettings,
    inputs: Mapping[str, tuple[torch.Tensor, int]] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Train a layer's attention parameters on one pass over the batches ``fit``; keep the best state seen.

    With several processes a step sees a batch of each: gradients are added, and there are fewer steps.

    Args:
        module: the attention module; changed in place.
        names: its parameters to train.
        loss_of: the relative error on a batch, differentiable in those parameters.
        fit, held_out: numbers of the batches to train and to judge on.
        settings: see there.
        inputs: for the weights among ``names`` the second moment of what they multiply, (F, F), and the axis of the
            weight that F lies along; those are trained in whitened coordinates.
        processes: the processes that do this together, each on its own batches; all end with the same parameters.

    Returns:
        Held-out error before and after; after is never larger.
    """

    judged = processes.sum(len(held_out))

    def judge() -> float:
        with torch.no_grad():
            return processes.sum(sum(float(loss_of(batch)) for batch in held_out)) / judged

    before = best = judge()
    kept = {name: module.get_parameter(name).detach().clone() for name in names}
    parameters = []
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if inputs is not None and name in inputs:
            moments, axis = inputs[name]
            white = processes.from_first(partial(_whitened, moments, axis, settings.whitening))
            parametrize.register_parametrization(owner, leaf, white.to(module.get_parameter(name).device))
            parameters.append(owner.get_parameter(f"parametrizations.{leaf}.original"))
        else:
            parameters.append(module.get_parameter(name))
    sizes = [float(p.detach().square().mean().sqrt()) for p in parameters]
    # A bias that is zero has no size of its own.
    usual = sum(sizes) / len(sizes)
    rates = [settings.learning_rate * (size or usual) for size in sizes]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=settings.betas)
    # Of some processes the last batch may be missing: they take part in the last step all the same.
    steps, worse, lowest = max(processes.all_gather(len(fit))), 0, math.inf
    every = max(1, steps // settings.checks)
    for step in range(steps):
        scale = min(1.0, (step + 1) / max(1.0, settings.warmup * steps))
        scale *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        optimizer.zero_grad()
        if step < len(fit):
            loss_of(fit[step]).backward()
        if processes.size > 1:
            _add_gradients(parameters, processes)
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            now = judge()
            if now < best:
                best, kept = now, {name: attrgetter(name)(module).detach().clone() for name in names}
            # The start is a solved optimum: the first steps may well be worse, and still lead somewhere better.
            worse = 0 if now < lowest else worse + 1
            lowest = min(lowest, now)
            if worse > settings.patience:
                break
    for name, parameter in zip(names, parameters, strict=True):
        parameter.requires_grad_(False)
        parameter.grad = None
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if parametrize.is_parametrized(owner, leaf):
            parametrize.remove_parametrizations(owner, leaf)
    if processes.size > 1:
        # Processors of several kinds need not round a step alike.
        best, kept = processes.from_first(lambda: (best, {name: value.cpu() for name, value in kept.items()}))
    with torch.no_grad():
        for name, value in kept.items():
            module.get_parameter(name).requires_grad_(False).copy_(value)
    return before, best


def _whitened(moments: torch.Tensor, axis: int, level: float) -> _Whitened:
    # From the CPU it can be sent to other processes.
    return _Whitened(moments, axis, level).cpu()


def _add_gradients(parameters: Sequence[torch.Tensor], processes: ProcessGroup) -> None:
    own = {str(place): p.grad for place, p in enumerate(parameters) if p.grad is not None}
    for place, gradient in processes.sum_tensors(own).items():
        parameters[int(place)].grad = gradient.to(parameters[int(place)].device)
