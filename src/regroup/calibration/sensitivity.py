"""What each layer loses with fewer KV heads, measured on text, each layer alone."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..errors import RegroupError, human_bytes
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.heads import projection_tensors
from ..solver.solve import LayerSolution
from .install import stored_tensors
from .joint import Heads, JointModel, KeptSolutions
from .layer_converter import LayerConverter
from .layer_runner import Inputs, LayerRunner
from .settings import Settings
from .sweep import sweep

# Begins a stage of the work: its title, how much there is of what; gives a function to call with what was just done.
Stage = Callable[[str, int, str], contextlib.AbstractContextManager[Callable[[int], object]]]


def quiet(*_: object) -> contextlib.AbstractContextManager[Callable[[int], object]]:
    """A stage that nobody is told of."""
    return contextlib.nullcontext(lambda count: None)


@dataclass(frozen=True)
class Measured:
    """One layer at one number of KV heads: how it was converted, and what that cost.

    Attributes:
        want: the layer's plan with the methods and the order that were chosen.
        kl: KL divergence of the original model's predictions from those of the model with this layer alone converted,
            in nats per token of held-out text.
    """

    want: LayerPlan
    kl: float


@dataclass(frozen=True)
class ConvertedAlone:
    """Every layer of a model, converted to every number of KV heads on the hidden states of the original model.

    Attributes:
        wants: for each layer by name and each number of KV heads its plan with the methods and the order that were
            chosen.
        held_out: the batches that were held out.
        model: whole models of these layers on the text that it is given.
        stage: told of progress.
    """

    wants: Mapping[str, Mapping[int, LayerPlan]]
    held_out: Sequence[Inputs]
    model: Callable[[Sequence[Inputs]], JointModel]
    stage: Stage

    def costs(self, model: JointModel) -> dict[str, dict[int, Measured]]:
        """What each layer costs at each number of KV heads on the model's text, while all others are as they were."""
        original = model.original
        variants: dict[tuple[str, int], Heads] = {
            (layer.name, heads): (*original[:place], heads, *original[place + 1 :])
            for place, layer in enumerate(model.layout.layers)
            for heads in self.wants[layer.name]
            if heads != layer.num_key_value_heads
        }
        with self.stage("measuring each layer alone", len(variants), "conversions") as count:
            found = model.divergences(list(variants.values()), progress=count)
        costs = dict(zip(variants, found, strict=True))
        return {
            name: {heads: Measured(want, costs.get((name, heads), 0.0)) for heads, want in by_heads.items()}
            for name, by_heads in self.wants.items()
        }


def measure(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    choices: Mapping[str, Sequence[int]],
    batches: Sequence[Inputs],
    settings: Settings,
    *,
    device: str = "cpu",
    stage: Stage = quiet,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, dict[int, Measured]]:
    """Convert every layer to every number of KV heads, each alone, and see what it does to the model's predictions.

    Args:
        checkpoint, layout, plan, choices, batches, settings, device, stage, processes: see ``converted_alone``.

    Raises:
        RegroupError: as ``converted_alone``; numbers that are not finite.
    """
    given = (checkpoint, layout, plan, choices, batches, settings)
    with converted_alone(*given, device=device, stage=stage, processes=processes) as alone:
        return alone.costs(alone.model(alone.held_out))


@contextlib.contextmanager
def converted_alone(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    choices: Mapping[str, Sequence[int]],
    batches: Sequence[Inputs],
    settings: Settings,
    *,
    device: str = "cpu",
    stage: Stage = quiet,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[ConvertedAlone]:
    """Convert every layer to every number of KV heads, each alone; the solutions are on the disk while the block lasts.

    Args:
        checkpoint, layout: of the original model.
        plan: says by which methods layers are merged, or that they are chosen.
        choices: for each layer by name the numbers of KV heads to try; keeping all costs nothing and is not tried.
        batches: model inputs, of which the last ones are held out.
        settings: see there.
        device: where layers run.
        stage: told of progress.
        processes: those that do this together, each on its share of the batches; all get the same answer.

    Raises:
        RegroupError: no room for the solutions, or as ``calibrate``.
    """
    with tempfile.TemporaryDirectory(prefix="regroup-") as folder:
        if processes.rank == 0:
            _check_room(checkpoint, layout, choices, Path(folder))
        kept = KeptSolutions(Path(folder) if processes.rank == 0 else None)
        runner = LayerRunner(checkpoint.folder, layout, processes.shard(batches), device=device)
        converter = LayerConverter(checkpoint, runner, settings, processes)
        with stage("converting each layer alone", len(runner), "layers") as count:
            wants = _solve(converter, layout, plan, choices, kept, count)
        held_out = sum(processes.all_gather(len(converter.held_out)))
        del converter, runner
        model = partial(JointModel, checkpoint, layout, solution=kept.load, device=device, processes=processes)
        yield ConvertedAlone(wants, list(batches[len(batches) - held_out :]), model, stage)


@torch.no_grad()
def _solve(
    converter: LayerConverter,
    layout: Layout,
    plan: Plan,
    choices: Mapping[str, Sequence[int]],
    kept: KeptSolutions,
    progress: Callable[[int], object],
) -> dict[str, dict[int, LayerPlan]]:
    """Solve all layers in one sweep; gives ``ConvertedAlone.wants``."""
    plans = {want.name: want for want in plan.layers}

    def wanted(layer: AttentionLayer) -> list[LayerPlan]:
        narrower = (heads for heads in choices[layer.name] if heads != layer.num_key_value_heads)
        return [replace(plans[layer.name], num_key_value_heads=heads) for heads in narrower]

    found = {
        layer.name: {heads: replace(plans[layer.name], num_key_value_heads=heads) for heads in choices[layer.name]}
        for layer in layout.layers
    }
    for visit in sweep(converter, wanted, list(converter.runner.hidden)):
        for number, layer in enumerate(visit.layers):
            grouping = visit.groupings.get(layer.name)
            for want in grouping.wants if grouping is not None else ():
                heads, student = want.num_key_value_heads, visit.teacher.copy()
                solvers = visit.groupings[layer.name].solvers(heads)
                chosen, outcome = converter.convert(
                    student,
                    visit.layers[: number + 1],
                    solvers,
                    visit.outputs[layer.name],
                    visit.before,
                    visit.before,
                )
                tensors = stored_tensors(student, layer, converter.checkpoint)
                kept.keep(layer.name, LayerSolution(chosen, tensors, outcome))
                found[layer.name][heads] = chosen
        progress(1)
    return found


def _check_room(checkpoint: Checkpoint, layout: Layout, choices: Mapping[str, Sequence[int]], folder: Path) -> None:
    """Refuse to begin where the solutions do not fit on the disk."""
    needed = 0
    for layer in layout.layers:
        infos = [checkpoint.tensors[name] for name in projection_tensors(layer)]
        whole = sum(TORCH_DTYPES[info.dtype].itemsize * math.prod(info.shape) for info in infos)
        needed += whole * sum(heads != layer.num_key_value_heads for heads in choices[layer.name])
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RegroupError(
            "there is no room for the converted layers that are compared",
            file=folder.parent,
            expected=f"{human_bytes(needed)} at most",
            got=f"{human_bytes(free)} free",
            remedy="set TMPDIR to a folder with more room",
        )
