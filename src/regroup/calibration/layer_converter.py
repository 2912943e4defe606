"""Convert one attention layer where the converted model is: candidates are tried, judged on held-out text, repaired."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import AttentionLayer
from ..plans import LayerPlan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.heads import gather, load_into, scatter
from ..solver.solve import LayerOutcome, LayerSolver
from .candidates import Candidates
from .decoder_layer import DecoderLayer
from .groupings import Groupings
from .layer_regression import LayerRegression
from .layer_runner import LayerRunner
from .settings import Settings


class LayerConverter:
    """Converts attention layers of one checkpoint.

    Args:
        checkpoint: the original model.
        runner: its decoder layers and this process's share of the text.
        settings: see there.
        processes: those that share the text. What is fitted and judged on is the same batches as in one process.

    Attributes:
        fit, held_out: numbers of this process's batches that are fitted on, and judged on.
        judging: those of ``fit`` that candidates are fitted on.
    """

    def __init__(
        self, checkpoint: Checkpoint, runner: LayerRunner, settings: Settings, processes: ProcessGroup = SINGLE_PROCESS
    ) -> None:
        self.checkpoint, self.runner, self.settings, self.processes = checkpoint, runner, settings, processes
        count = sum(processes.all_gather(len(runner.batches)))
        size = processes.all_gather(max(1, runner.hidden[0].shape[0] * runner.hidden[0].shape[1]))[0]
        kept = settings.held_out_batches(count, size)
        self.fit, self.held_out = processes.local_indices(0, count - kept), processes.local_indices(count - kept, count)
        widest = max(layer.num_attention_heads * layer.head_dim for layer in runner.layout.layers)
        judged = max(settings.judged_on, settings.judged_rows * widest)
        self.judging = processes.local_indices(0, min(count - kept, max(1, judged // size)))

    def observe(
        self,
        teacher: DecoderLayer,
        layers: Sequence[AttentionLayer],
        hidden: list[torch.Tensor],
        groupings: Sequence[Groupings],
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """Run a decoder layer of the original model over all batches, and count what its attention computes.

        Args:
            teacher: the layer.
            layers: its attention layers.
            hidden: hidden states before it, for each batch.
            groupings: of those attention layers that are to be converted; they count the text.

        Returns:
            For each attention layer what its output projection gave for each batch, and hidden states after the layer.

        Raises:
            RegroupError: the hidden states are not finite.
        """
        searching = [grouping for grouping in groupings if grouping.searches]
        for batch in self.judging if searching else ():
            # Only the inputs of attention are needed; the pass ends at the last output projection.
            traces, _ = teacher.observe(batch, hidden[batch], layers, whole=False)
            for grouping in searching:
                grouping.add_for_search(traces[grouping.layer.name], *self.runner.masks(batch, grouping.layer))
        for grouping in groupings:
            grouping.choose(self.processes)
        outputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
        after: list[torch.Tensor] = []
        for batch, states in enumerate(hidden):
            traces, result = teacher.observe(batch, states, layers, whole=True)
            assert result is not None
            if not result.isfinite().all():
                raise RegroupError(
                    "the original model's hidden states are not finite numbers",
                    file=self.checkpoint.folder,
                    layer=f"decoder layer {teacher.index}",
                    got="NaN or infinity after it",
                    remedy="download the checkpoint again, or look for the training step that broke it",
                )
            after.append(result.cpu())
            for layer in layers:
                outputs[layer.name].append(traces[layer.name].output.cpu())
            for grouping in groupings if batch in self.fit else ():
                grouping.add(traces[grouping.layer.name], *self.runner.masks(batch, grouping.layer))
        for grouping in groupings:
            grouping.merge(self.processes)
        return outputs, after

    def convert(
        self,
        student: DecoderLayer,
        layers: Sequence[AttentionLayer],
        solvers: Sequence[LayerSolver],
        targets: list[torch.Tensor],
        hidden: list[torch.Tensor],
        original: list[torch.Tensor],
    ) -> tuple[LayerPlan, LayerOutcome]:
        """Convert the last of ``layers`` in the student, in place.

        Args:
            student: a copy of the decoder layer, its earlier attention layers converted already.
            layers: attention layers of the decoder layer up to the one to convert.
            solvers: one for each way to group the heads, of which the best stays.
            targets: for each batch what the output projection gave, (B, T, hidden).
            hidden: the converted model's hidden states before the decoder layer, for each batch.
            original: those of the original model.

        Returns:
            What was chosen, and how good it is on held-out text.
        """
        layer, repair = layers[-1], self.settings.repair
        judging, fit = (None, None) if repair == "none" else (self.judging, self.fit)
        weights = [position_weights(states) for states in original]
        regression = LayerRegression(student, layers, targets, hidden, original, self.held_out, self.processes, weights)
        candidates = Candidates(self.checkpoint, regression, solvers, judging)
        best = candidates.best()
        want, made = candidates.want(best), candidates.install(best)
        refit = regression.refit(made.output.flatten(0, 1), None if repair == "distill" else fit)
        merged = refit.error_before
        if repair == "distill":
            regression.where_the_original_runs().distill(self.fit, self.settings.distillation)
            slot = layer.output.weight
            weight = regression.attention.get_parameter(slot.tensor.removeprefix(layer.name + "."))
            trained = gather(slot, lambda _: weight).flatten(0, 1)
            refit = regression.refit(trained, fit)
            heads = refit.weights.view_as(made.output)
            load_into(regression.attention, layer, {slot.tensor: scatter([(slot, heads)])})
        else:
            candidates.put(want, replace(made, output=refit.weights.view_as(made.output)))
        return want, LayerOutcome(layer.name, want.key_method, want.value_method, merged, refit.error)


def position_weights(hidden: torch.Tensor) -> torch.Tensor:
    """What the squared error of each position counts: one over the mean square of its hidden state, (B, T, 1).

    What reads the residual stream divides it by its size at each position, so an error counts relative to that. Without
    this a few positions decide everything: in many models the first token has hidden states of a hundred times the
    usual size (Sun et al. 2024, "Massive Activations in Large Language Models").
    """
    squares = hidden.square().mean(-1, keepdim=True)
    # Positions without any size count as much as usual ones.
    return torch.where(squares > 0, 1 / squares.clamp(min=1e-30), 1 / squares.mean().clamp(min=1e-30))
