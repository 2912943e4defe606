"""Repair after merging: a layer is distilled where the original one runs, and its output projection is solved again.

Distillation has the original attention's output as its target, on the original model's hidden states. The output
projection is solved where the converted model runs; its target is the same, plus what the converted model's residual
stream lacks before the layer where that is known (``AttentionLayer.residual_scale``): it makes up for earlier layers as
far as it can. As a target of distillation that lack would drown what the layer itself has to learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

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


def distill(
    module: nn.Module,
    names: Sequence[str],
    loss_of: Callable[[int], torch.Tensor],
    fit: Sequence[int],
    held_out: Sequence[int],
    settings: DistillSettings,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[float, float]:
    """Train a layer's attention parameters on several passes over the batches ``fit``, a step for each batch.

    With several processes a step sees a batch of each: gradients are added, and there are fewer steps.

    Args:
        module: the attention module; changed in place.
        names: its parameters to train.
        loss_of: the relative error on a batch, differentiable in those parameters.
        fit, held_out: numbers of the batches to train and to judge on.
        settings: see there.
        processes: the processes that do this together, each on its own batches; all end with the same parameters.

    Returns:
        Held-out error before and after. Where it would not be smaller the module stays as it was, to the last bit.
    """
    judged = processes.sum(len(held_out))

    def judge() -> float:
        with torch.no_grad():
            return processes.sum(sum(float(loss_of(batch)) for batch in held_out)) / judged

    before = judge()
    parameters = [module.get_parameter(name) for name in names]
    kept = [parameter.detach().clone() for parameter in parameters]
    sizes = [float(p.detach().square().mean().sqrt()) for p in parameters]
    # A bias that is zero has no size of its own.
    usual = sum(sizes) / len(sizes)
    rates = [settings.learning_rate * (size or usual) for size in sizes]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(groups, betas=settings.betas, fused=True)
    # Of some processes the last batch may be missing: they take part in the last step all the same.
    each = max(processes.all_gather(len(fit)))
    steps = settings.passes * each
    order, places = torch.Generator().manual_seed(0), list[int]()
    for step in range(steps):
        if step % each == 0:
            places = torch.randperm(len(fit), generator=order).tolist()
        scale = min(1.0, (step + 1) / max(1.0, settings.warmup * steps))
        scale *= 0.5 * (1 + math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        optimizer.zero_grad()
        if step % each < len(fit):
            loss_of(fit[places[step % each]]).backward()
        if processes.size > 1:
            _add_gradients(parameters, processes)
        optimizer.step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    # Processors of several kinds need not round a step alike.
    after, values = processes.from_first(partial(_judged, parameters, judge()))
    better = after < before
    with torch.no_grad():
        for parameter, value in zip(parameters, values if better else kept, strict=True):
            parameter.copy_(value)
    return before, after if better else before


def _judged(parameters: Sequence[torch.Tensor], error: float) -> tuple[float, list[torch.Tensor]]:
    """An error with the parameters that it is of; from the CPU they can be sent to other processes."""
    return error, [parameter.detach().cpu() for parameter in parameters]


def _add_gradients(parameters: Sequence[torch.Tensor], processes: ProcessGroup) -> None:
    own = {str(place): p.grad for place, p in enumerate(parameters) if p.grad is not None}
    for place, gradient in processes.sum_tensors(own).items():
        parameters[int(place)].grad = gradient.to(parameters[int(place)].device)
