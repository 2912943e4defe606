"""How one attention layer may be converted: groupings and methods, each installed in the child and judged there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..merge import Sharing
from ..modeling.modeling_regroup import regroup_attention
from ..plans import LayerPlan
from ..solver.grouping import Option
from ..solver.heads import HeadWeights, load_into, share
from ..solver.solve import solve_keys, solve_values
from ..writer.rewrite import rewrites
from .layer_regression import Lesson

_KEY_METHODS = ("lowrank", "procrustes")
_VALUE_METHODS = ("lowrank", "procrustes")
# One layer's held-out error is not the model's loss: Procrustes has to be better by more than chance to be taken.
_MARGIN = 1.05


class Candidate(NamedTuple):
    """The number of a grouping, and the methods for keys and values."""

    option: int
    key: str
    value: str


class Candidates:
    """The ways to convert one attention layer.

    Args:
        checkpoint: the parent.
        lesson: the layer in the child, as the parent has it.
        weights: of the parent's attention.
        options: ways to group the heads.
        fit: numbers of the batches that the output projection is solved again on before a candidate is judged; None
            judges it as it is merged.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        lesson: Lesson,
        weights: HeadWeights,
        options: Sequence[Option],
        fit: Sequence[int] | None,
    ) -> None:
        self.checkpoint, self.lesson, self.weights, self.options, self.fit = checkpoint, lesson, weights, options, fit
        self._stock = lesson.attention
        self._solved: dict[tuple[str, int, str], list[Sharing]] = {}
        self._errors: dict[Candidate, float] = {}

    def best(self, *, methods: bool) -> Candidate:
        """The candidate of the least held-out error.

        Args:
            methods: try every method that the layer allows; else each grouping with the plan's.
        """
        planned = self.options[0].want
        if not methods:
            candidates = [Candidate(at, planned.key_method, planned.value_method) for at in range(len(self.options))]
            return min(candidates, key=self.error) if len(candidates) > 1 else candidates[0]
        keys = _KEY_METHODS if self.lesson.layer.key_obstacle is None else ("mean",)
        values = _VALUE_METHODS if self.lesson.layer.value_obstacle is None else ("mean",)
        for at in range(len(self.options)):
            # Keys first, with the values' likely choice; then values. All pairs would cost as many passes again.
            first = min((Candidate(at, key, values[0]) for key in keys), key=self._handicapped)
            for value in values:
                self.error(first._replace(value=value))
        return min(self._errors, key=self._handicapped)

    def error(self, candidate: Candidate) -> float:
        """The share of the targets' energy that it misses on held-out text. It is installed when first asked for."""
        if candidate not in self._errors:
            output = self.install(candidate).output.flatten(0, 1)
            self._errors[candidate] = self.lesson.refit(output, self.fit)[0].error
        return self._errors[candidate]

    def install(self, candidate: Candidate) -> HeadWeights:
        """Put a candidate into the child, and return its heads."""
        want = self.options[candidate.option].want
        made = self.lesson.processes.from_first(
            lambda: share(
                self.weights, want.order, self._sharings("key", candidate), self._sharings("value", candidate)
            )
        )
        self.put(want, made)
        return made

    def put(self, want: LayerPlan, made: HeadWeights) -> None:
        """Put grouped attention with these heads into the child, rounded as it will be stored."""
        lesson, layer = self.lesson, self.lesson.layer
        module = copy.deepcopy(self._stock)
        regroup_attention(module, want.num_key_value_heads, layer.name)
        tensors = self.checkpoint.tensors
        moves, _ = rewrites(layer, want, tensors, std=0.0, seed=0)
        made_tensors = made.tensors(layer.with_kv_heads(want.num_key_value_heads))
        extras = {name: how.run(name, self.checkpoint.read) for name, how in moves.items() if name not in made_tensors}
        rounded = {
            name: value.to(TORCH_DTYPES[tensors[name].dtype]).float() for name, value in (extras | made_tensors).items()
        }
        load_into(module, layer, rounded)
        parent_path, _, name = lesson.pupil.stream.inside(layer).rpartition(".")
        setattr(lesson.pupil.module.get_submodule(parent_path), name, module)

    def want(self, candidate: Candidate) -> LayerPlan:
        """The plan of the layer that a candidate stands for."""
        return replace(self.options[candidate.option].want, key_method=candidate.key, value_method=candidate.value)

    def _sharings(self, part: str, candidate: Candidate) -> list[Sharing]:
        """How the heads of each group share their keys or values, solved once."""
        method = candidate.key if part == "key" else candidate.value
        place = (part, candidate.option, method)
        if place not in self._solved:
            option, layer = self.options[candidate.option], self.lesson.layer
            order, groups = option.want.order, option.want.num_key_value_heads
            if part == "key":
                self._solved[place] = solve_keys(method, layer, option.moments, order, groups)
            else:
                self._solved[place] = solve_values(method, layer, self.weights, option.moments, order, groups)
        return self._solved[place]

    def _handicapped(self, candidate: Candidate) -> float:
        return self.error(candidate) * _MARGIN ** [candidate.key, candidate.value].count("procrustes")
