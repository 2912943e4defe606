"""Convert on text, one layer after the other: measure, share, choose by held-out error, repair, and move on.

Two streams of hidden states run side by side, the original model's and the converted model's. Statistics are taken
where the original model is; what is chosen and repaired is judged where the converted model is, on text that was not
fitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.solve import LayerOutcome, LayerSolution
from ..solver.store import SolutionStore
from .decoder_layer import DecoderLayer
from .divergence import divergences
from .install import install, stored_tensors
from .layer_converter import LayerConverter
from .layer_runner import LayerRunner
from .settings import Settings
from .sweep import LayerVisit, sweep


@dataclass(frozen=True)
class Calibrated:
    """What calibration found; the solutions themselves are in the store.

    Attributes:
        plan: with the methods and the orders that were chosen.
        outcomes: for each layer that was converted, how good it is.
        kl: KL divergence of the original model's predictions from the converted model's on the held-out text, in nats
            per token. Methods were chosen on that text, so it may be a little low. It is not finite where the converted
            model's predictions are not.
    """

    plan: Plan
    outcomes: list[LayerOutcome]
    kl: float

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {
            "held_out_kl_nats_per_token": self.kl if math.isfinite(self.kl) else None,
            "predicted_kl_nats_per_token": self.plan.predicted_kl,
            "layers": [asdict(outcome) for outcome in self.outcomes],
        }


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    batches: Sequence[dict[str, torch.Tensor]],
    store: SolutionStore | None,
    settings: Settings,
    *,
    device: str = "cpu",
    progress: Callable[[int], None] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Calibrated:
    """Convert every layer that the plan changes, on calibration text.

    Args:
        checkpoint, layout, plan: of the original model. A method that the plan names is used; ``"auto"`` is chosen.
        batches: model inputs, of which the last ones are held out.
        store: keeps the solution of each layer. Layers that it has already, from a run that was killed, are not solved
            again. None in processes that only help another.
        settings: see there.
        device: where layers run.
        progress: called with 1 after each decoder layer.
        processes: those that do this together, each called with the same arguments but the store and these two. Each
            keeps hidden states of its own batches alone.

    Raises:
        RegroupError: a model that transformers cannot load, numbers that are not finite, or fewer batches than
            processes.
    """
    runner = LayerRunner(checkpoint.folder, layout, processes.shard(batches), device=device)
    converter = LayerConverter(checkpoint, runner, settings, processes)
    run = _Run(converter, plan, store)
    run.resume()
    if progress is not None:
        progress(run.done)
    for visit in sweep(converter, run.wanted, run.original, start=run.done):
        run.convert(visit)
        if progress is not None:
            progress(1)
    chosen = tuple(run.solved[layer.name].want if layer.name in run.solved else layer for layer in plan.layers)
    held_out = [run.converted[batch] for batch in converter.held_out]
    kl = divergences(converter, run.original, {"converted": held_out})["converted"]
    if not math.isfinite(kl) and not math.isfinite(run.own_divergence()):
        raise RegroupError(
            "the original model's predictions are not finite numbers",
            file=checkpoint.folder,
            got="NaN or infinity in the final norm or the output embedding",
            remedy="download the checkpoint again, or look for the training step that broke it",
        )
    outcomes = [solution.outcome for solution in run.solved.values() if solution.outcome is not None]
    return Calibrated(replace(plan, layers=chosen), outcomes, kl)


class _Run:
    """Both streams of hidden states, and what has been solved.

    Attributes:
        original, converted: hidden states of each batch after ``done`` decoder layers.
        solved: by attention layer; without their tensors, which the store keeps.
    """

    def __init__(self, converter: LayerConverter, plan: Plan, store: SolutionStore | None) -> None:
        self.converter, self.store = converter, store
        self.runner, self.processes = converter.runner, converter.processes
        self.plans = {want.name: want for want in plan.layers}
        self.solved: dict[str, LayerSolution] = {}
        self.done = 0
        self.original, self.converted = list(self.runner.hidden), list(self.runner.hidden)
        # These lists are as large as all the text: what is not needed any more is let go.
        self.runner.hidden.clear()

    def wanted(self, layer: AttentionLayer) -> list[LayerPlan]:
        """The plan of a layer that is to be solved."""
        want = self.plans[layer.name]
        return [want] if want.changes else []

    def convert(self, visit: LayerVisit) -> None:
        """Convert one decoder layer and advance both streams through it."""
        student = visit.teacher.copy()
        for number, layer in enumerate(visit.layers):
            if layer.name not in visit.groupings:
                continue
            targets = visit.outputs.pop(layer.name)
            want = self.plans[layer.name]
            solvers = visit.groupings[layer.name].solvers(want.num_key_value_heads)
            chosen, outcome = self.converter.convert(
                student, visit.layers[: number + 1], solvers, targets, self.converted, visit.before
            )
            solution = LayerSolution(chosen, stored_tensors(student, layer, self.converter.checkpoint), outcome)
            if self.store is not None:
                self.store.keep(layer.name, solution)
            self.solved[layer.name] = replace(solution, tensors={})
        self._advance(student, visit.after)

    def own_divergence(self) -> float:
        """The original model's predictions from themselves on held-out text: 0, or not finite where they are not."""
        own = [self.original[batch] for batch in self.converter.held_out]
        return divergences(self.converter, self.original, {"own": own})["own"]

    def resume(self) -> None:
        """Go past the decoder layers that the store has solutions for.

        One process alone reads the hidden states that were kept last, and runs the layers after them again, as they
        were run before; several processes run all of them again.
        """
        names = self.processes.from_first(lambda: [] if self.store is None else self.store.names())
        if not names:
            return
        todo = [layer.index for layer in self.runner.layout.layers if self.wanted(layer) and layer.name not in names]
        stop = min(todo, default=len(self.runner))
        if self.store is not None and self.processes.size == 1:
            kept = self.store.load_states(self.original)
            if kept is not None and kept[0] <= stop:
                self.done, self.original, self.converted = kept
                before = [layer.name for layer in self.runner.layout.layers if layer.index < self.done]
                self.solved = {name: self.store.facts(name) for name in before if name in names}
        while self.done < stop:
            self._replay(self.done)

    def _replay(self, index: int) -> None:
        teacher = self.runner.layer(index)
        student = teacher.copy()
        for name, solution in self._load(index).items():
            layer = next(layer for layer in self.runner.attention_layers(index) if layer.name == name)
            install(student, layer, solution.want, solution.tensors, self.converter.checkpoint)
            self.solved[name] = replace(solution, tensors={})
        # As when it was observed, for the same bits.
        after = [teacher.forward(b, hidden, weights=True).cpu() for b, hidden in enumerate(self.original)]
        self._advance(student, after, keep=False)

    def _load(self, index: int) -> dict[str, LayerSolution]:
        """The kept solutions of one decoder layer, in all processes."""
        names = [layer.name for layer in self.runner.attention_layers(index) if self.wanted(layer)]
        store = self.store
        return self.processes.from_first(lambda: {} if store is None else {name: store.load(name) for name in names})

    def _advance(self, student: DecoderLayer, after: list[torch.Tensor], *, keep: bool = True) -> None:
        for batch, hidden in enumerate(self.converted):
            self.converted[batch] = student.forward(batch, hidden).cpu()
        self.original = after
        self.done += 1
        if keep and self.store is not None and self.processes.size == 1:
            self.store.keep_states(self.done, self.original, self.converted)
