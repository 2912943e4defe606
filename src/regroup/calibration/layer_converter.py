"""One attention layer, converted where the child is: candidates are tried, judged on held-out text, and repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch

from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import AttentionLayer
from ..plans import LayerPlan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.grouping import Groupings, Option
from ..solver.heads import HeadWeights, gather, load_into, scatter
from .candidates import Candidates
from .decoder_layer import DecoderLayer
from .layer_regression import Lesson
from .layer_runner import LayerStream
from .repair import DistillSettings


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        choose: try every method for keys and values, layer by layer; else keep the plan's.
        search: look for heads that belong together, where the plan names no order and the family allows one.
        repair: ``"none"``, ``"output"`` (solve the output projection again) or ``"distill"`` (train the layer's
            attention).
        held_out: share of the batches that is judged on and never fitted,
        held_out_tokens: and how many tokens of them at most, at one batch at least.
        judged_on: tokens to fit candidates on; what is chosen is fitted on all of the text.
        distillation: see there.
        seed: of the search.
    """

    choose: bool = True
    search: bool = True
    repair: str = "output"
    held_out: float = 0.125
    held_out_tokens: int = 16_384
    judged_on: int = 16_384
    distillation: DistillSettings = field(default_factory=DistillSettings)
    seed: int = 0


@dataclass(frozen=True)
class LayerOutcome:
    """What was chosen for a layer, and what it misses of its target on held-out text.

    The target is what the parent's attention gives and what the child's residual stream lacks before it, so that the
    share missed grows with depth.

    Attributes:
        name, key_method, value_method: of the layer.
        error_merged, error: shares of the target's energy that are missed after merging, and after repair.
    """

    name: str
    key_method: str
    value_method: str
    error_merged: float
    error: float


class AttentionWorker:
    """Converts attention layers of one checkpoint.

    Args:
        checkpoint: the parent.
        stream: its decoder layers and this process's share of the text.
        settings: see there.
        processes: those that share the text. What is fitted and judged on is the same batches as in one process.

    Attributes:
        fit, held_out: numbers of this process's batches that are fitted and judged on.
        judging: those of ``fit`` that candidates are fitted on.
    """

    def __init__(
        self, checkpoint: Checkpoint, stream: LayerStream, settings: Settings, processes: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.checkpoint, self.stream, self.settings, self.processes = checkpoint, stream, settings, processes
        count = sum(processes.all_gather(len(stream.batches)))
        size = processes.all_gather(max(1, stream.hidden[0].shape[0] * stream.hidden[0].shape[1]))[0]
        kept = max(1, min(round(count * settings.held_out), settings.held_out_tokens // size))
        self.fit, self.held_out = processes.local_indices(0, count - kept), processes.local_indices(count - kept, count)
        self.judging = processes.local_indices(0, min(count - kept, max(1, settings.judged_on // size)))

    def observe(
        self,
        teacher: DecoderLayer,
        layers: Sequence[AttentionLayer],
        hidden: list[torch.Tensor],
        groupings: Sequence[Groupings],
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """Run a decoder layer of the parent over all batches, and gather what its attention does.

        Args:
            teacher: the layer.
            layers: its attention layers.
            hidden: hidden states before it, for each batch.
            groupings: of those attention layers that are to be converted.

        Returns:
            For each attention layer what its output projection gave for each batch, and hidden states after the layer.

        Raises:
            RegroupError: the hidden states are not finite.
        """
        first = [grouping for grouping in groupings if grouping.looks_first]
        for batch in self.judging if first else ():
            # Only what enters the attention is looked at; the pass ends at the last output projection.
            seen, _ = teacher.observe(batch, hidden[batch], layers, whole=False)
            for grouping in first:
                grouping.look(seen[grouping.layer.name], *self.stream.masks(batch, grouping.layer))
        for grouping in groupings:
            grouping.settle(self.processes)
        outputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
        after: list[torch.Tensor] = []
        for batch, states in enumerate(hidden):
            seen, result = teacher.observe(batch, states, layers, whole=True)
            assert result is not None
            if not result.isfinite().all():
                raise RegroupError(
                    "the parent's hidden states are not finite numbers",
                    file=self.checkpoint.folder,
                    layer=f"decoder layer {teacher.index}",
                    got="NaN or infinity after it",
                    remedy="download the checkpoint again, or look for the training step that broke it",
                )
            after.append(result.cpu())
            for layer in layers:
                outputs[layer.name].append(seen[layer.name].output.cpu())
            for grouping in groupings if batch in self.fit else ():
                grouping.add(seen[grouping.layer.name], *self.stream.masks(batch, grouping.layer))
        for grouping in groupings:
            grouping.merge(self.processes)
        return outputs, after

    def convert(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        weights: HeadWeights,
        options: Sequence[Option],
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
    ) -> tuple[LayerPlan, LayerOutcome]:
        """Convert the last of ``layers`` in the pupil, in place.

        Args:
            pupil: a copy of the decoder layer, its earlier attention layers converted already.
            layers: attention layers of the decoder layer up to the one to convert.
            weights: of the parent's attention.
            options: ways to group the heads, of which the best stays.
            targets: for each batch what the output projection should give, (B, T, hidden).
            child: hidden states before the decoder layer, for each batch.

        Returns:
            What was chosen, and how good it is on held-out text.
        """
        layer, repair = layers[-1], self.settings.repair
        judging, fit = (None, None) if repair == "none" else (self.judging, self.fit)
        lesson = Lesson(pupil, layers, targets, child, self.held_out, self.processes)
        candidates = Candidates(self.checkpoint, lesson, weights, options, judging)
        best = candidates.best(methods=self.settings.choose)
        want, made = candidates.want(best), candidates.install(best)
        refit, attended = lesson.refit(made.output.flatten(0, 1), fit)
        merged = refit.error_before
        candidates.put(want, replace(made, output=refit.weights.view_as(made.output)))
        if repair == "distill":
            lesson.distill(self.fit, self.settings.distillation, lesson.input_moments(self.judging, attended))
            slot = layer.output.weight
            weight = lesson.attention.get_parameter(slot.tensor.removeprefix(layer.name + "."))
            trained = gather(slot, lambda _: weight).flatten(0, 1)
            refit, _ = lesson.refit(trained, fit)
            heads = refit.weights.view_as(made.output)
            load_into(lesson.attention, layer, {slot.tensor: scatter([(slot, heads)])})
        return want, LayerOutcome(layer.name, want.key_method, want.value_method, merged, refit.error)
