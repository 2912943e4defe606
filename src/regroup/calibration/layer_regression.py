"""Fit one attention layer to what another one gives on text: its error, its output projection, and distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..layout.types import AttentionLayer
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.heads import projection_tensors
from .decoder_layer import AttentionTrace, DecoderLayer
from .repair import Refit, Regression, distill, refit_output
from .settings import DistillSettings


@dataclass(frozen=True)
class LayerRegression:
    """An attention layer with its inputs and targets.

    Attributes:
        student: the decoder layer, which is changed in place.
        layers: its attention layers up to the one that is fitted, in the order of the forward pass.
        targets: for each batch what the original model's output projection gave, (B, T, hidden).
        hidden: hidden states before the decoder layer, for each batch, (B, T, hidden).
        original: those of the original model. What the others lack of them is asked of the output projection as well.
        held_out: numbers of the batches that are judged on and never fitted.
        processes: those that do this together, each on its own batches.
        weights: for each batch what the squared error of each position counts, (B, T, 1); None counts all alike.
    """

    student: DecoderLayer
    layers: Sequence[AttentionLayer]
    targets: Sequence[torch.Tensor]
    hidden: Sequence[torch.Tensor]
    original: Sequence[torch.Tensor]
    held_out: Sequence[int]
    processes: ProcessGroup = SINGLE_PROCESS
    weights: Sequence[torch.Tensor] | None = None

    @property
    def layer(self) -> AttentionLayer:
        """The one that is fitted."""
        return self.layers[-1]

    @property
    def attention(self) -> torch.nn.Module:
        """Its module, as it is now."""
        return self.student.attention(self.layer)

    def trace(self, batch: int) -> AttentionTrace:
        """What the attention computes on a batch."""
        traces, _ = self.student.observe(batch, self.hidden[batch], self.layers, whole=False)
        return traces[self.layer.name]

    def target(self, batch: int) -> torch.Tensor:
        """What the output projection should give where there is text, (rows, hidden)."""
        target, scale = self.targets[batch], self.layer.residual_scale
        if scale is not None and self.original[batch] is not self.hidden[batch]:
            # In units of the output projection's result.
            target = target + (self.original[batch] - self.hidden[batch]) / scale
        return self._rows(target.to(self.student.caller.device), batch)

    def where_the_original_runs(self) -> LayerRegression:
        """The same layer on the original model's hidden states, of which nothing is lacking."""
        return replace(self, hidden=self.original)

    def weighted(self, squares: torch.Tensor, batch: int) -> torch.Tensor:
        """Squared errors (rows, hidden) where there is text, each as much as its position counts."""
        return squares if self.weights is None else squares * self._rows(self.weights[batch].to(squares), batch)

    def refit(self, output: torch.Tensor, fit: Sequence[int] | None) -> Refit:
        """Held-out error of the layer, with the output projection solved again where it may be.

        Args:
            output: the projection that the layer has, (F, hidden).
            fit: numbers of the batches to solve it on; None leaves it as it is.

        Returns:
            The projection (F, hidden) with errors.
        """
        fitted = None if fit is None else self._sums(fit)
        held_out = self._sums(self.held_out).merged(self.processes)
        if fitted is None:
            error = self.processes.from_first(lambda: held_out.error(output))
            return Refit(output, error, error)
        merged = fitted.merged(self.processes)
        best = self.processes.from_first(lambda: refit_output(merged, held_out, output))
        return replace(best, weights=best.weights.to(output.dtype))

    def distill(self, fit: Sequence[int], settings: DistillSettings) -> tuple[float, float]:
        """Train the layer's four projections against its targets.

        Args:
            fit: numbers of the batches to train on.
            settings: see there.

        Returns:
            The share of the targets' energy that held-out batches miss, before and after.
        """
        energy = sum(float(self.weighted(self.target(batch).square(), batch).sum()) for batch in self.held_out)
        power = self.processes.sum(energy) / self.processes.sum(len(self.held_out))

        def loss_of(batch: int) -> torch.Tensor:
            gap = (self._rows(self.trace(batch).output, batch) - self.target(batch)).square()
            return self.weighted(gap, batch).sum() / power

        names = [name.removeprefix(self.layer.name + ".") for name in projection_tensors(self.layer)]
        with torch.enable_grad():
            return distill(self.attention, names, loss_of, fit, self.held_out, settings, self.processes)

    def _sums(self, batches: Sequence[int]) -> Regression:
        """The regression of targets on inputs of the output projection, summed over batches of this process."""
        name = self.layer.output.weight.tensor.removeprefix(self.layer.name + ".").removesuffix(".weight")
        bias = getattr(self.attention.get_submodule(name), "bias", None)
        sums = Regression()
        for batch in batches:
            mixed, target = self._rows(self.trace(batch).mixed, batch), self.target(batch)
            target = target if bias is None else target - bias
            if self.weights is not None:
                root = self._rows(self.weights[batch].to(mixed), batch).sqrt()
                mixed, target = mixed * root, target * root
            sums.add(mixed, target)
        return sums

    def _rows(self, states: torch.Tensor, batch: int) -> torch.Tensor:
        """Positions that hold text: (B, T, F) to (rows, F)."""
        rows, _ = self.student.caller.masks(batch, self.layer)
        flat = states.flatten(0, 1)
        return flat if rows is None else flat[rows.flatten().bool().to(flat.device)]
