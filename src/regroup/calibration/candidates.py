"""The ways to convert one attention layer, each installed in the converted model and judged there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..checkpoint import Checkpoint
from ..merge.registry import METHODS
from ..plans import LayerPlan
from ..solver.heads import HeadWeights
from ..solver.solve import LayerSolver
from .install import install
from .layer_regression import LayerRegression


class Candidate(NamedTuple):
    """The number of a grouping, and the methods for keys and values."""

    grouping: int
    key_method: str
    value_method: str


class Candidates:
    """The ways to convert one attention layer.

    Args:
        checkpoint: the original model.
        regression: of the layer, which the converted model still has as the original one has it.
        solvers: one for each grouping that is tried, the plan's own first.
        fit: numbers of the batches that the output projection is solved again on before a candidate is judged; None
            judges it as it is merged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        regression: LayerRegression,
        solvers: Sequence[LayerSolver],
        fit: Sequence[int] | None,
    ) -> None:
        self.checkpoint, self.regression, self.solvers, self.fit = checkpoint, regression, solvers, fit
        self._stock = regression.attention
        self._errors: dict[Candidate, float] = {}

    def best(self) -> Candidate:
        """The candidate of the least held-out error. A method that the plan names is the only one."""
        layer, want = self.regression.layer, self.solvers[0].want
        keys = _methods(want.key_method, layer.key_obstacle, rotated=layer.rotary is not None)
        values = _methods(want.value_method, layer.value_obstacle, rotated=False)
        if len(self.solvers) * len(keys) * len(values) == 1:
            return Candidate(0, keys[0], values[0])
        for grouping in range(len(self.solvers)):
            # Keys first, with the values' likely choice; then values. All pairs would cost as many passes again.
            first = min((Candidate(grouping, key, values[0]) for key in keys), key=self._handicapped)
            for value in values:
                self.error(first._replace(value_method=value))
        return min(self._errors, key=self._handicapped)

    def error(self, candidate: Candidate) -> float:
        """The share of the targets' energy that it misses on held-out text. It is installed when first asked for."""
        if candidate not in self._errors:
            output = self.install(candidate).output.flatten(0, 1)
            self._errors[candidate] = self.regression.refit(output, self.fit).error
        return self._errors[candidate]

    def install(self, candidate: Candidate) -> HeadWeights:
        """Put a candidate into the converted model, and return its heads."""
        solver = self.solvers[candidate.grouping]
        made = self.regression.processes.from_first(lambda: solver.heads(candidate.key_method, candidate.value_method))
        self.put(self.want(candidate), made)
        return made

    def put(self, want: LayerPlan, made: HeadWeights) -> None:
        """Put grouped attention with these heads into the converted model, rounded as it will be stored."""
        layer = self.regression.layer
        tensors = made.tensors(layer.with_kv_heads(want.num_key_value_heads))
        install(self.regression.student, layer, want, tensors, self.checkpoint, stock=self._stock)

    def want(self, candidate: Candidate) -> LayerPlan:
        """The plan of the layer that a candidate stands for."""
        grouping, key_method, value_method = candidate
        return replace(self.solvers[grouping].want, key_method=key_method, value_method=value_method)

    def _handicapped(self, candidate: Candidate) -> float:
        methods = METHODS[candidate.key_method], METHODS[candidate.value_method]
        return self.error(candidate) * (methods[0].handicap * methods[1].handicap)


def _methods(wanted: str, obstacle: str | None, *, rotated: bool) -> list[str]:
    """The methods to try for the keys or the values of a layer, the likeliest to be chosen first."""
    if wanted != "auto":
        return [wanted]
    if obstacle is not None:
        return ["mean"]
    candidates = [m for m in METHODS.values() if m.candidate and (m.share_rotary is not None or not rotated)]
    return [m.name for m in sorted(candidates, key=lambda m: m.handicap)]
