"""Several processes of this machine that work together as under a launcher, and stay for the next piece of work."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import helpers
import tiny
from regroup import RegroupError
from regroup.calibration.calibrate import calibrate
from regroup.calibration.decoder_layer import DecoderLayer
from regroup.calibration.groupings import Groupings
from regroup.calibration.layer_converter import LayerConverter
from regroup.calibration.layer_runner import LayerRunner
from regroup.calibration.moments import MomentSums
from regroup.calibration.repair import distill
from regroup.calibration.settings import DistillSettings, Settings
from regroup.checkpoint import open_checkpoint
from regroup.plans import Plan, Result
from regroup.processes import SINGLE_PROCESS, ProcessGroup, launched
from regroup.solver.heads import HeadWeights
from regroup.solver.statistics import Moments
from regroup.writer.journal import Journal
from regroup.writer.preview import prepare
from regroup.writer.write import write

Answer = tuple[int, str]


class Crew:
    """So many processes; they have imported everything already when the second piece of work comes."""

    def __init__(self, size: int) -> None:
        # Forked from a process that has imported the slow parts once, and has no threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "transformers", "regroup.calibration.calibrate"])
        self.size = size
        self.pool = ProcessPoolExecutor(size, context, initializer=torch.set_num_threads, initargs=(1,))

    def __call__(self, job: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What each process answers, called with these arguments; each gets one, since all wait for each other."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        places = [
            {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": self.size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            for rank in range(self.size)
        ]
        futures = [self.pool.submit(_placed, place, job, arguments) for place in places]
        return [future.result(timeout=180) for future in futures]


def _placed(place: dict[str, Any], job: Callable[..., Any], arguments: Sequence[Any]) -> Any:
    with mock.patch.dict(os.environ, {name: str(value) for name, value in place.items()}):
        return job(*arguments)


def joined(job: Callable[..., Any], *arguments: Any) -> Any:
    """Call a job with the processes and these arguments, in every process alike."""
    with launched() as processes:
        found = job(processes, *arguments)
        if processes.rank > 0:
            processes.assist()
        return found


def command(*words: object) -> Answer:
    """Exit status and standard error of ``regroup`` with these arguments; 1 where it ends in a traceback."""
    try:
        status, _, err = helpers.run(*words)
    except ValueError as error:
        return 1, repr(error)
    return status, err


def command_that_fails(at: int, kind: type[Exception], *words: object) -> Answer:
    """The same, with an error in the process ``at`` when it has run some of its batches."""
    calls, real = [0], DecoderLayer.observe

    def observe(self: DecoderLayer, *arguments: Any, **options: Any) -> Any:
        calls[0] += 1
        if os.environ["RANK"] == str(at) and calls[0] == 5:
            raise RegroupError("a planned fault", remedy="none") if kind is RegroupError else kind("a planned fault")
        return real(self, *arguments, **options)

    with mock.patch.object(DecoderLayer, "observe", observe):
        return command(*words)


def batches(name: str, count: int = 8) -> list[dict[str, torch.Tensor]]:
    return [tiny.inputs(name, 2, 12, seed=seed) for seed in range(count)]


def moments(
    processes: ProcessGroup, folder: Path, name: str, plan: Plan, count: int, merge: bool
) -> tuple[list[Moments], int]:
    """Of the first decoder layer, for each way to group its heads; and of how many batches hidden states are kept."""
    layout, checkpoint = helpers.layout_of(folder), open_checkpoint(folder)
    with contextlib.ExitStack() as stack, torch.no_grad():
        if not merge:
            stack.enter_context(mock.patch.object(MomentSums, "merge", return_value=None))
        stream = LayerRunner(folder, layout, processes.shard(batches(name, count)))
        worker = LayerConverter(checkpoint, stream, Settings(), processes)
        layers = stream.attention_layers(0)
        groupings = [
            Groupings(layer, HeadWeights.read(layer, checkpoint.read), [want], search=True, seed=0)
            for layer, want in zip(layers, plan.layers, strict=False)
        ]
        worker.observe(stream.layer(0), layers, stream.hidden, groupings)
        heads = plan.layers[0].num_key_value_heads
        found = [solver.statistics.moments for grouping in groupings for solver in grouping.solvers(heads)]
        return found, len(stream.hidden)


def solved(
    processes: ProcessGroup, folder: Path, name: str, plan: Plan, scratch: Path, count: int, settings: Settings
) -> Any:
    """What calibration comes to, and which layers it solved; the first process writes the model, in ``scratch``."""
    checkpoint, layout = open_checkpoint(folder), helpers.layout_of(folder)
    plan, data = helpers.on_text(plan, choose=settings.repair != "distill"), batches(name, count)
    if processes.rank > 0:
        found = calibrate(checkpoint, layout, plan, data, None, settings, processes=processes)
        return found.plan, found.outcomes, found.kl, []
    prepared, stage = prepare(checkpoint, layout, plan), scratch / "child"
    stage.mkdir()
    journal = Journal(checkpoint, plan, prepared.preview.shards)
    journal.begin(stage)
    found = calibrate(checkpoint, layout, plan, data, journal.store, settings, processes=processes)
    names = journal.store.names()
    write(prepared, Result(found.plan), stage, journal)
    return found.plan, found.outcomes, found.kl, names


def problem(count: int) -> tuple[torch.nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    """A linear layer and so many batches of random regression."""
    draw = torch.Generator().manual_seed(3)
    module = torch.nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=draw))
    return module, [(torch.randn(6, 4, generator=draw), torch.randn(6, 3, generator=draw)) for _ in range(count)]


def trained(processes: ProcessGroup, count: int, settings: DistillSettings) -> tuple[torch.Tensor, float, float]:
    """The layer of ``problem``, its bias last, distilled on all batches but the last two, and its held-out errors."""
    module, data = problem(count)
    own = processes.shard(data)
    fit, held_out = processes.local_indices(0, count - 2), processes.local_indices(count - 2, count)

    def loss_of(batch: int) -> torch.Tensor:
        inputs, targets = own[batch]
        return (module(inputs) - targets).square().sum()

    before, after = distill(module, ["weight", "bias"], loss_of, fit, held_out, settings, processes=processes)
    return weights_of(module), before, after


def weights_of(module: Any) -> torch.Tensor:
    return torch.cat([module.weight, module.bias[:, None]], 1).detach()


def alone(job: Callable[..., Any], *arguments: Any) -> Any:
    """The same job in one process."""
    return job(SINGLE_PROCESS, *arguments)
