"""From what is known of a layer to its new weights: the one place where heads are shared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..checkpoint.dtypes import TORCH_DTYPES
from ..layout.types import AttentionLayer, TensorInfo
from ..merge.registry import method
from ..merge.sharing import Sharing
from ..plans import LayerPlan
from .heads import HeadWeights, Read, group_owners, share
from .statistics import LayerStatistics, weight_statistics


@dataclass(frozen=True)
class LayerOutcome:
    """What was chosen for a layer, and what it misses of its target on held-out text.

    The target is what the original attention gives, plus what the converted model's residual stream lacks before it, so
    that the share missed grows with depth.

    Attributes:
        name, key_method, value_method: of the layer.
        error_merged, error: shares of the target's energy that are missed after merging, and after repair.
    """

    name: str
    key_method: str
    value_method: str
    error_merged: float
    error: float


@dataclass(frozen=True)
class LayerSolution:
    """One converted attention layer.

    Attributes:
        want: the layer's plan, with the methods and the order that were used.
        tensors: weights and biases of the four projections by name, in the dtypes that are stored.
        outcome: how good it is on held-out text; None where it was solved from the weights alone.
    """

    want: LayerPlan
    tensors: dict[str, torch.Tensor]
    outcome: LayerOutcome | None = None


class LayerSolver:
    """Shares the heads of one layer, grouped in one way, by any methods. Each part is solved once per method.

    Args:
        layer: of the original model.
        want: the order of query heads and the number of groups; its methods do not count here.
        statistics: for this grouping.
    """

    def __init__(self, layer: AttentionLayer, want: LayerPlan, statistics: LayerStatistics) -> None:
        self.layer, self.want, self.statistics = layer, want, statistics
        self._sharings: dict[tuple[str, str], list[Sharing]] = {}

    def heads(self, key_method: str, value_method: str) -> HeadWeights:
        """The shared heads, and queries and outputs that absorb what they need, in float32."""
        return share(self.statistics.weights, self.want.order, self.keys(key_method), self.values(value_method))

    def keys(self, name: str) -> list[Sharing]:
        """A sharing of the keys for each group, by a method that shares (``merge.registry``)."""
        if ("key", name) not in self._sharings:
            rotary, moments, made = self.layer.rotary, self.statistics.moments, []
            rule = method(name).function("share" if rotary is None else "share_rotary")
            rotation = {} if rotary is None else {"pairs": rotary.pairs, "dim": rotary.dim}
            for (members, _, owner), own in zip(self._groups(), moments.key, strict=True):
                made.append(rule(moments.query[torch.tensor(members)], own, owner, **rotation))
            self._sharings["key", name] = made
        return self._sharings["key", name]

    def values(self, name: str) -> list[Sharing]:
        """A sharing of the values for each group; errors are measured as each head attends, where that is known."""
        if ("value", name) not in self._sharings:
            moments, made = self.statistics.moments, []
            rule = method(name).function("share")
            output = self.statistics.weights.output.double()
            for (members, _, owner), own in zip(self._groups(), moments.attended or moments.value, strict=True):
                W = output[torch.tensor(members)]
                made.append(rule(W @ W.mT, own, owner))
            self._sharings["value", name] = made
        return self._sharings["value", name]

    def _groups(self) -> list[tuple[list[int], list[int], list[int]]]:
        return group_owners(self.want.order, self.layer.num_key_value_heads, self.want.num_key_value_heads)


def solve(
    layer: AttentionLayer, want: LayerPlan, statistics: LayerStatistics, tensors: Mapping[str, TensorInfo]
) -> LayerSolution:
    """Convert one layer by the methods of its plan.

    Args:
        layer: of the original model.
        want: its plan; assumed to be checked.
        statistics: for the plan's grouping, from weights or from text.
        tensors: the original tensors by name, for the dtypes to store.

    Returns:
        The converted layer, rounded once from float32 to the dtypes that are stored.
    """
    heads = LayerSolver(layer, want, statistics).heads(want.key_method, want.value_method)
    made = heads.tensors(layer.with_kv_heads(want.num_key_value_heads))
    return LayerSolution(want, {name: value.to(TORCH_DTYPES[tensors[name].dtype]) for name, value in made.items()})


def solve_by_weights(
    layer: AttentionLayer, want: LayerPlan, read: Read, tensors: Mapping[str, TensorInfo]
) -> LayerSolution:
    """``solve`` with statistics of the weights alone, which ``read`` gives by name."""
    weights = HeadWeights.read(layer, read)
    return solve(layer, want, weight_statistics(weights, want.order, want.num_key_value_heads), tensors)
