"""Conversion with text: a layer at a time, measure, share, choose by held-out error, repair, and move on.

Two streams of hidden states run side by side, the parent's and the child's. Moments are taken where the parent is;
what is chosen and repaired is judged where the child is, on text that was not fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..checkpoint.writer import save_tensors
from ..errors import RegroupError
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.grouping import Groupings
from ..solver.heads import HeadWeights, load_into, projection_tensors
from ..writer.rewrite import Given
from .decoder_layer import DecoderLayer
from .layer_converter import AttentionWorker, LayerOutcome, Settings
from .layer_runner import LayerStream

K = TypeVar("K", bound=Hashable)


@dataclass(frozen=True)
class Calibrated:
    """The outcome: a plan that says what was chosen, tensors on the disk, and what was lost.

    Attributes:
        plan, given, outcomes: see there.
        kl: KL divergence of the parent's predictions from the child's on the held-out text, nats a token. Methods were
            chosen on that text, so it may be a little low.
    """

    plan: Plan
    given: dict[str, Given]
    outcomes: list[LayerOutcome]
    kl: float

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "held_out_kl_nats_per_token": self.kl,
            "predicted_kl_nats_per_token": self.plan.predicted_kl,
            "layers": [asdict(outcome) for outcome in self.outcomes],
        }


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    batches: Sequence[dict[str, torch.Tensor]],
    scratch: Path | None,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Calibrated:
    """Convert every layer that the plan changes, on calibration text.

    Args:
        checkpoint, layout, plan: of the parent. Methods in the plan count where ``settings.choose`` is off.
        batches: model inputs, of which the last ones are held out.
        scratch: folder for the solved tensors, a file a layer; None in processes that only help another.
        settings: see there.
        device: where layers run.
        progress: called with 1 after each decoder layer.
        processes: those that do this together, each called with the same arguments but those two. Each keeps hidden
            states of its own batches alone.

    Raises:
        RegroupError: a method that a layer does not allow, a parent that transformers cannot load, or fewer batches
            than processes.
    """
    stream = LayerStream(checkpoint.folder, layout, processes.shard(batches), device=device)
    loop = _Loop(checkpoint, plan, stream, scratch, AttentionWorker(checkpoint, stream, settings, processes))
    for index in range(len(stream)):
        loop.layer(index)
        if progress is not None:
            progress(1)
    chosen = tuple(loop.chosen.get(layer.name, layer) for layer in plan.layers)
    held_out = [loop.child[batch] for batch in loop.worker.held_out]
    kl = divergences(stream, loop.worker, loop.parent, {"child": held_out})["child"]
    if not math.isfinite(kl):
        raise RegroupError(
            "the parent's predictions are not finite numbers",
            file=checkpoint.folder,
            got="NaN or infinity in the final norm or the output embedding",
            remedy="download the checkpoint again, or look for the training step that broke it",
        )
    return Calibrated(replace(plan, layers=chosen), loop.given, loop.outcomes, kl)


class _Loop:
    """Both streams, and what has been found so far."""

    def __init__(
        self, checkpoint: Checkpoint, plan: Plan, stream: LayerStream, scratch: Path | None, worker: AttentionWorker
    ) -> None:
        self.checkpoint, self.stream, self.scratch, self.worker = checkpoint, stream, scratch, worker
        self.settings = worker.settings
        self.wants = {layer.name: layer for layer in plan.layers}
        self.chosen: dict[str, LayerPlan] = {}
        self.given: dict[str, Given] = {}
        self.outcomes: list[LayerOutcome] = []
        self.parent, self.child = list(stream.hidden), list(stream.hidden)
        # The lists are as large as all the text: what is not needed any more is let go.
        stream.hidden.clear()

    def layer(self, index: int) -> None:
        """Convert one decoder layer and advance both streams through it."""
        layers = self.stream.attention_layers(index)
        teacher = self.stream.layer(index)
        changing = [layer for layer in layers if self.wants[layer.name].changes]
        groupings = {
            layer.name: Groupings(
                layer,
                HeadWeights.read(layer, self.checkpoint.read),
                [self.wants[layer.name]],
                search=self.settings.search,
                seed=self.settings.seed,
            )
            for layer in changing
        }
        outputs, after = self.worker.observe(teacher, layers, self.parent, list(groupings.values()))
        pupil = teacher.copy()
        for number, layer in enumerate(layers):
            if layer not in changing:
                continue
            add_lack(layer, outputs[layer.name], self.parent, self.child)
            want, outcome = self.worker.convert(
                pupil,
                layers[: number + 1],
                groupings[layer.name].weights,
                groupings[layer.name].options(self.wants[layer.name].num_key_value_heads),
                outputs.pop(layer.name),
                self.child,
            )
            self._keep(pupil, layer)
            self.chosen[layer.name] = want
            self.outcomes.append(outcome)
        for batch, hidden in enumerate(self.child):
            self.child[batch] = pupil.forward(batch, hidden).cpu()
        self.parent = after

    def _keep(self, pupil: DecoderLayer, layer: AttentionLayer) -> None:
        """Write the converted tensors to the scratch folder, in the parent's dtypes."""
        attention = pupil.attention(layer)
        entries = self.checkpoint.tensors
        tensors = {}
        for name in projection_tensors(layer):
            value = attention.get_parameter(name.removeprefix(layer.name + ".")).detach().cpu()
            tensors[name] = value.to(TORCH_DTYPES[entries[name].dtype]).contiguous()
        if self.scratch is not None:
            path = self.scratch / f"{layer.name}.safetensors"
            save_tensors(tensors, path)
            for name, value in tensors.items():
                self.given[name] = Given(tuple(value.shape), entries[name].dtype, path)
        # What stays in the pupil is what was written.
        load_into(attention, layer, {name: value.float() for name, value in tensors.items()})


def add_lack(
    layer: AttentionLayer, outputs: list[torch.Tensor], parent: list[torch.Tensor], child: list[torch.Tensor]
) -> None:
    """Add to what the parent's output projection gave what the child's stream lacks before it, in place."""
    if layer.residual_scale is not None:
        for output, p, c in zip(outputs, parent, child, strict=True):
            # In units of the output projection's result.
            output += (p - c) / layer.residual_scale


def divergences(
    stream: LayerStream,
    worker: AttentionWorker,
    parent: list[torch.Tensor],
    alive: Mapping[K, list[torch.Tensor]],
) -> dict[K, float]:
    """Mean KL divergence from the parent of every choice, from hidden states after the last layer."""
    totals = dict.fromkeys(alive, 0.0)
    tokens = 0
    for place, batch in enumerate(worker.held_out):
        # With attention masks, only positions that hold text count.
        rows, _ = stream.masks(batch, stream.layout.layers[0])
        expected = stream.logits(batch, parent[batch])
        keep = torch.ones(expected.shape[:2], dtype=torch.bool) if rows is None else rows.bool()
        keep = keep.to(expected.device)
        tokens += int(keep.sum())
        for key, states in alive.items():
            got = stream.logits(batch, states[place])
            # A row at a time: copies of all logits would take several times the layer.
            apart = torch.stack([_divergence(*pair) for pair in zip(expected, got, strict=True)])
            totals[key] += float(apart[keep].double().sum())
    tokens = worker.processes.sum(tokens)
    return {key: max(worker.processes.sum(total) / tokens, 0.0) for key, total in totals.items()}


def _divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL divergence (T,) in nats of logits (T, V) from those that are expected."""
    log_p, log_q = expected.log_softmax(-1), got.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)
