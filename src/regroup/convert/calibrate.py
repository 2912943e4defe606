"""Conversion with text: a layer at a time, measure, share, choose by held-out error, repair, and move on.

Two streams of hidden states run side by side, the parent's and the child's. Moments are taken where the parent is;
what is chosen and repaired is judged where the child is, on text that was not fitted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..checkpoint import Checkpoint
from ..checkpoint.reader import TORCH_DTYPES
from ..layout.types import AttentionLayer, Layout
from ..models.modeling_regroup import regroup_attention
from ..plan import LayerPlan, Plan
from .heads import HeadWeights, group_owners, load_into, share
from .layers import DecoderLayer, LayerStream, Seen
from .repair import DistillSettings, Regression, distill, refit_output
from .rewrite import Given, rewrites
from .solve import Moments, solve_keys, solve_values

KEY_METHODS = ("lowrank", "procrustes")
VALUE_METHODS = ("lowrank", "procrustes")


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        choose: try every method for keys and values, layer by layer; else keep the plan's.
        repair: ``"none"``, ``"output"`` (solve the output projection again) or ``"distill"`` (train the layer's
            attention, then solve the output projection again).
        held_out: share of the batches that is judged on and never fitted.
        distillation: see there.
    """

    choose: bool = True
    repair: str = "output"
    held_out: float = 0.125
    distillation: DistillSettings = field(default_factory=DistillSettings)


@dataclass(frozen=True)
class LayerOutcome:
    """What was chosen for a layer, and the share of the parent's attention output that held-out text then misses."""

    name: str
    key_method: str
    value_method: str
    error_merged: float
    error: float


@dataclass(frozen=True)
class Calibrated:
    """The outcome: a plan that says what was chosen, tensors on the disk, and the errors that were left."""

    plan: Plan
    given: dict[str, Given]
    outcomes: list[LayerOutcome]

    def to_json(self) -> list[dict[str, Any]]:
        return [asdict(outcome) for outcome in self.outcomes]


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    batches: Sequence[dict[str, torch.Tensor]],
    scratch: Path,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
) -> Calibrated:
    """Convert every layer that the plan changes, on calibration text.

    Args:
        checkpoint, layout, plan: of the parent. Methods in the plan count where ``settings.choose`` is off.
        batches: model inputs, of which the last ones are held out.
        scratch: folder for the solved tensors, a file a layer.
        settings: see there.
        device: where layers run.
        progress: called with 1 after each decoder layer.

    Raises:
        RegroupError: a method that a layer does not allow, or a parent that transformers cannot load.
    """
    stream = LayerStream(checkpoint.folder, layout, batches, device=device)
    worker = _Worker(checkpoint, layout, plan, stream, scratch, settings)
    parent = [hidden.clone() for hidden in stream.hidden]
    child = [hidden.clone() for hidden in stream.hidden]
    for index in range(len(stream)):
        worker.layer(index, parent, child)
        if progress is not None:
            progress(1)
    chosen = tuple(worker.chosen.get(layer.name, layer) for layer in plan.layers)
    return Calibrated(replace(plan, layers=chosen), worker.given, worker.outcomes)


class _Worker:
    """What stays the same from layer to layer, and what has been found so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        plan: Plan,
        stream: LayerStream,
        scratch: Path,
        settings: Settings,
    ) -> None:
        self.checkpoint, self.layout, self.plan, self.stream = checkpoint, layout, plan, stream
        self.scratch, self.settings = scratch, settings
        self.wants = {layer.name: layer for layer in plan.layers}
        self.chosen: dict[str, LayerPlan] = {}
        self.given: dict[str, Given] = {}
        self.outcomes: list[LayerOutcome] = []
        count = len(stream.batches)
        kept = max(1, round(count * settings.held_out))
        self.fit, self.held_out = range(count - kept), range(count - kept, count)

    def layer(self, index: int, parent: list[torch.Tensor], child: list[torch.Tensor]) -> None:
        """Convert one decoder layer and advance both streams through it, in place."""
        layers = self.stream.attention_layers(index)
        teacher = self.stream.layer(index)
        gatherers = {layer.name: _Gatherer(layer, self.wants[layer.name], self._weights(layer)) for layer in layers}
        outputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
        after: list[torch.Tensor] = []
        for batch, hidden in enumerate(parent):
            seen, result = teacher.observe(batch, hidden, layers, whole=True)
            for layer in layers:
                outputs[layer.name].append(seen[layer.name].output.cpu())
                if batch in self.fit:
                    gatherers[layer.name].add(seen[layer.name], *self._masks(batch, layer))
            assert result is not None
            after.append(result.cpu())

        pupil = teacher.copy()
        for number, layer in enumerate(layers):
            if not self.wants[layer.name].changes:
                continue
            targets = outputs[layer.name]
            if layer.residual_scale is not None:
                # What the child's stream lacks before this layer, in units of the output projection's result.
                targets = [y + (p - c) / layer.residual_scale for y, p, c in zip(targets, parent, child, strict=True)]
            self._attention(pupil, layers[: number + 1], gatherers[layer.name], targets, child)
        for batch, hidden in enumerate(child):
            child[batch] = pupil.forward(batch, hidden).cpu()
        parent[:] = after

    def _attention(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        gatherer: _Gatherer,
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
    ) -> None:
        """Convert the last of ``layers`` in the pupil."""
        layer, want, weights = layers[-1], gatherer.want, gatherer.weights
        moments = gatherer.moments()
        stock = pupil.attention(layer)
        tried: dict[tuple[str, str], tuple[float, HeadWeights]] = {}

        def attempt(key: str, value: str) -> float:
            if (key, value) not in tried:
                keys = solve_keys(key, layer, moments, want.order, want.num_key_value_heads)
                values = solve_values(value, layer, weights, moments, want.order, want.num_key_value_heads)
                made = share(weights, want.order, keys, values)
                self._install(pupil, layer, stock, want, made)
                error, made = self._refit(pupil, layers, made, targets, child)
                tried[key, value] = (error, made)
            return tried[key, value][0]

        key, value = want.key_method, want.value_method
        if self.settings.choose:
            keys = KEY_METHODS if layer.key_obstacle is None else ("mean",)
            values = VALUE_METHODS if layer.value_obstacle is None else ("mean",)
            # Keys first, with the values' likely choice; then values. All pairs would cost as many passes again.
            key = min(keys, key=lambda name: attempt(name, values[0]))
            value = min(values, key=lambda name: attempt(key, name))
        error = attempt(key, value)
        merged = error
        want = replace(want, key_method=key, value_method=value)
        self._install(pupil, layer, stock, want, tried[key, value][1])
        if self.settings.repair == "distill":
            merged, error = self._distill(pupil, layers, want, targets, child)
        self._keep(pupil, layer, want)
        self.chosen[layer.name] = want
        self.outcomes.append(LayerOutcome(layer.name, key, value, merged, error))

    def _weights(self, layer: AttentionLayer) -> HeadWeights:
        return HeadWeights.read(layer, self.checkpoint.read)

    def _masks(self, batch: int, layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which query positions and which memory positions hold text, (B, T) and (B, S); None for all."""
        inputs = self.stream.batches[batch]
        decoder = inputs.get("decoder_attention_mask")
        return decoder, inputs.get("attention_mask") if layer.kind == "cross" else decoder

    def _install(
        self, pupil: DecoderLayer, layer: AttentionLayer, stock: torch.nn.Module, want: LayerPlan, made: HeadWeights
    ) -> None:
        """Put grouped attention with these heads into the pupil, rounded as it will be stored."""
        module = copy.deepcopy(stock)
        regroup_attention(module, want.num_key_value_heads, layer.name)
        tensors = self.checkpoint.tensors
        moves, _ = rewrites(layer, want, tensors, std=0.0, seed=0)
        made_tensors = made.tensors(layer.with_kv_heads(want.num_key_value_heads))
        extras = {name: how.run(name, self.checkpoint.read) for name, how in moves.items() if name not in made_tensors}
        rounded = {
            name: value.to(TORCH_DTYPES[tensors[name].dtype]).float() for name, value in (extras | made_tensors).items()
        }
        load_into(module, layer, rounded)
        parent_path, _, name = self.stream.inside(layer).rpartition(".")
        setattr(pupil.module.get_submodule(parent_path), name, module)

    def _refit(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        made: HeadWeights,
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
    ) -> tuple[float, HeadWeights]:
        """Held-out error of these heads, with the output projection solved again unless repair is off."""
        layer = layers[-1]
        bias = self._output_bias(pupil, layer)
        sums = {True: Regression(), False: Regression()}
        batches = self.held_out if self.settings.repair == "none" else range(len(child))
        for batch in batches:
            seen, _ = pupil.observe(batch, child[batch], layers, whole=False)
            mixed, target = seen[layer.name].mixed.flatten(0, 1), targets[batch].flatten(0, 1).to(self.stream.device)
            rows, _ = self._masks(batch, layer)
            if rows is not None:
                mixed, target = mixed[rows.flatten().bool()], target[rows.flatten().bool()]
            sums[batch in self.fit].add(mixed.cpu(), (target if bias is None else target - bias).cpu())
        given = made.output.flatten(0, 1)
        if self.settings.repair == "none":
            return sums[False].error(given), made
        best = refit_output(sums[True], sums[False], given)
        return best.error, replace(made, output=best.weights.to(given.dtype).view_as(made.output))

    def _output_bias(self, pupil: DecoderLayer, layer: AttentionLayer) -> torch.Tensor | None:
        name = layer.output.weight.tensor.removeprefix(layer.name + ".").removesuffix(".weight")
        return getattr(pupil.attention(layer).get_submodule(name), "bias", None)

    def _distill(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        want: LayerPlan,
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
    ) -> tuple[float, float]:
        """Train the installed attention against the targets; held-out error before and after."""
        layer = layers[-1]
        power = sum(float(targets[batch].square().sum()) for batch in self.held_out) / len(self.held_out)

        def loss_of(batch: int) -> torch.Tensor:
            seen, _ = pupil.observe(batch, child[batch], layers, whole=False)
            difference = seen[layer.name].output - targets[batch].to(self.stream.device)
            rows, _ = self._masks(batch, layer)
            if rows is not None:
                difference = difference[rows.to(self.stream.device).bool()]
            return difference.square().sum() / power

        names = [name.removeprefix(layer.name + ".") for name in _tensor_names(layer)]
        with torch.enable_grad():
            return distill(pupil.attention(layer), names, loss_of, self.fit, self.held_out, self.settings.distillation)

    def _keep(self, pupil: DecoderLayer, layer: AttentionLayer, want: LayerPlan) -> None:
        """Write the converted tensors to the scratch folder, in the parent's dtypes."""
        attention = pupil.attention(layer)
        entries = self.checkpoint.tensors
        path = self.scratch / f"{layer.name}.safetensors"
        tensors = {}
        for name in _tensor_names(layer):
            value = attention.get_parameter(name.removeprefix(layer.name + ".")).detach().cpu()
            tensors[name] = value.to(TORCH_DTYPES[entries[name].dtype]).contiguous()
            self.given[name] = Given(tuple(value.shape), entries[name].dtype, path)
        save_file(tensors, path)
        # What stays in the pupil is what was written.
        load_into(attention, layer, {name: value.float() for name, value in tensors.items()})


def _tensor_names(layer: AttentionLayer) -> list[str]:
    """Weights and biases of the four projections."""
    names = {slot.tensor for p in layer.projections().values() for slot in (p.weight, p.bias) if slot is not None}
    return sorted(names)


class _Gatherer:
    """Accumulates the moments of one attention layer of the parent."""

    def __init__(self, layer: AttentionLayer, want: LayerPlan, weights: HeadWeights) -> None:
        self.layer, self.want, self.weights = layer, want, weights
        self._sums: dict[str, torch.Tensor] = {}
        self._rows = {"query": 0, "memory": 0}
        self._groups = group_owners(want.order, layer.num_key_value_heads, want.num_key_value_heads)

    def add(self, seen: Seen, query_mask: torch.Tensor | None, memory_mask: torch.Tensor | None) -> None:
        """Count one batch."""
        if not self.want.changes:
            return
        assert seen.weights is not None
        query = _project(seen.query_input, self.weights.query, self.weights.query_bias)
        key = _project(seen.memory, self.weights.key, self.weights.key_bias)
        value = _project(seen.memory, self.weights.value, self.weights.value_bias)
        rows, columns = _selected(query_mask, seen.query_input), _selected(memory_mask, seen.memory)
        q = query.flatten(0, 1)[rows].double()
        self._count("query", torch.einsum("thd,the->hde", q, q))
        for number, (members, distinct, _) in enumerate(self._groups):
            for name, states in (("key", key), ("value", value)):
                flat = states[:, :, distinct].flatten(0, 1)[columns].flatten(1).double()
                self._count(f"{name}.{number}", flat.T @ flat)
            stacked = value[:, :, distinct].flatten(2)
            moments = []
            for head in members:
                mixed = (seen.weights[:, head].float() @ stacked).flatten(0, 1)[rows].double()
                moments.append(mixed.T @ mixed)
            self._count(f"attended.{number}", torch.stack(moments))
        self._rows["query"] += int(rows.sum())
        self._rows["memory"] += int(columns.sum())

    def moments(self) -> Moments:
        """Means over the rows counted."""
        sums, rows = self._sums, self._rows
        return Moments(
            query=sums["query"] / rows["query"],
            key=[sums[f"key.{number}"] / rows["memory"] for number in range(len(self._groups))],
            value=[sums[f"value.{number}"] / rows["memory"] for number in range(len(self._groups))],
            attended=[sums[f"attended.{number}"] / rows["query"] for number in range(len(self._groups))],
        )

    def _count(self, name: str, value: torch.Tensor) -> None:
        wide = value.double().cpu()
        self._sums[name] = self._sums[name] + wide if name in self._sums else wide


def _project(states: torch.Tensor, heads: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(B, T, E) and (H, D, E) to (B, T, H, D)."""
    out = torch.einsum("bte,hde->bthd", states, heads.to(states))
    return out if bias is None else out + bias.to(states)


def _selected(mask: torch.Tensor | None, states: torch.Tensor) -> torch.Tensor:
    """Which of the B·T positions count, (B·T,) bool."""
    if mask is None or mask.shape != states.shape[:2]:
        return torch.ones(states.shape[0] * states.shape[1], dtype=torch.bool)
    return mask.flatten().bool()
