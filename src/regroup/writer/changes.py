"""How each tensor of a converted model comes about: pooled as it is written, or solved with its layer beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..checkpoint import Checkpoint, read_header
from ..layout.types import AttentionLayer, Layout, TensorInfo
from ..merge.registry import METHODS
from ..plans import LayerPlan, Plan
from ..solver.heads import Read, projection_tensors
from ..solver.rewrite import Change, rewrites
from ..solver.solve import solve_by_weights
from ..solver.store import SolutionStore


def solved_layers(layout: Layout, plan: Plan) -> dict[str, AttentionLayer]:
    """The layers whose heads are solved, by name: all that change on text, else those that pooling cannot convert."""
    found = {}
    for layer, want in zip(layout.layers, plan.layers, strict=True):
        methods = [METHODS[name] for name in (want.key_method, want.value_method) if name != "auto"]
        if want.changes and (plan.calibration is not None or any(method.linear_only for method in methods)):
            found[layer.name] = layer
    return found


@dataclass
class _LayerByWeights:
    """A layer that is solved from its weights when the first of its tensors is asked for."""

    layer: AttentionLayer
    want: LayerPlan
    infos: Mapping[str, TensorInfo]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, read: Read) -> torch.Tensor:
        if name not in self.tensors:
            self.tensors = dict(solve_by_weights(self.layer, self.want, read, self.infos).tensors)
        return self.tensors.pop(name)


@dataclass(frozen=True)
class SolvedTensor:
    """A tensor of a layer that is solved: what it is, before it is solved.

    It can be run where the weights alone decide, to check a converted model or to see how long a layer takes. A
    conversion solves layers first, and copies their tensors (``StoredTensor``).
    """

    shape: tuple[int, ...]
    dtype: str
    of: _LayerByWeights

    @property
    def layer(self) -> str:
        """The name of its layer."""
        return self.of.layer.name

    def run(self, name: str, read: Read) -> torch.Tensor:
        """Solve the layer from its weights, where that was not done for another of its tensors."""
        return self.of.take(name, read)


@dataclass(frozen=True)
class StoredTensor:
    """A solved tensor on the disk, at bytes ``start`` to ``end`` of a file."""

    shape: tuple[int, ...]
    dtype: str
    path: Path
    start: int
    end: int


def planned_changes(checkpoint: Checkpoint, layout: Layout, plan: Plan) -> tuple[dict[str, Change], set[str]]:
    """Every tensor that a plan changes, and the names of those that there are no more.

    Methods that are still to be chosen do not matter: shapes and dtypes follow from the numbers of KV heads alone.
    """
    tensors, solved = checkpoint.tensors, solved_layers(layout, plan)
    changed: dict[str, Change] = {}
    dropped: set[str] = set()
    for layer, want in zip(layout.layers, plan.layers, strict=True):
        moved, gone = rewrites(layer, want, tensors, std=layout.initializer_std, seed=plan.seed)
        changed |= moved
        dropped |= gone
        if layer.name in solved:
            of = _LayerByWeights(layer, want, tensors)
            for name in projection_tensors(layer):
                shape = moved[name].shape if name in moved else tensors[name].shape
                changed[name] = SolvedTensor(shape, tensors[name].dtype, of)
    return changed, dropped


def stored_tensors(store: SolutionStore, layers: Mapping[str, AttentionLayer]) -> dict[str, StoredTensor]:
    """The tensors of layers that are solved, in their files."""
    found = {}
    for name in layers:
        entries, _ = read_header(store.path(name))
        for tensor, entry in entries.items():
            found[tensor] = StoredTensor(entry.shape, entry.dtype, store.path(name), entry.start, entry.end)
    return found
