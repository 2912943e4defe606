"""From what a user names to a finished checkpoint: the steps of `regroup convert` as one function."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

from ..calibration.settings import Settings
from ..checkpoint import staged_folder
from ..checkpoint.writer import check_destination, existing_parent
from ..files import as_named
from ..listener import Listener
from ..opening import Source, open_source
from ..plans import Plan, Result, spelled_out
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.solve import solve_by_weights
from ..solver.store import SolutionStore
from ..writer.estimate import Estimate, estimate
from ..writer.journal import Journal
from ..writer.preview import Prepared, Preview, prepare
from ..writer.write import write
from .costs import layers_compared
from .request import Asked, asked_plan, check_asked, grouped

if TYPE_CHECKING:
    import torch

    from ..calibration.calibrate import Calibrated


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote.

    Attributes:
        destination: the converted model; None after a dry run.
        preview: what was, or would be, written.
        result: the plan with everything that was found; after a dry run as far as the weights tell.
        seconds: that it took.
        estimate: of a dry run, what it would take.
    """

    destination: Path | None
    preview: Preview
    result: Result
    seconds: float = 0.0
    estimate: Estimate | None = None


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    device: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    workers: int = 2,
    dry_run: bool = False,
    listener: Listener | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    **asked: Unpack[Asked],
) -> Conversion:
    """Convert a multi-head checkpoint to grouped-query attention.

    Args:
        source: a checkpoint folder or a hub id.
        destination: a folder that does not exist yet; it appears when it is complete. A conversion to it that was
            killed is resumed if it had the same source, plan and text.
        device: where calibration runs; by default a GPU where there is one.
        revision: branch, tag or commit of a hub repository.
        allow_pickle: read pickled weights, with torch's restricted unpickler, where there are no others.
        workers: threads that solve and write.
        dry_run: check everything, write nothing, and estimate time and disk.
        listener: for progress and notices.
        processes: those that share the calibration text, of which this one is the first; the others ``assist`` (see
            ``processes.launched``). They read the source from the same path.
        asked: ``kv_heads``, ``layers``, ``method``, ``grouping``, ``tensor_parallel``, ``seed``, ``calibration`` and
            ``repair``, or a ``plan``: see ``Asked``.

    Returns:
        What was written, or would be.

    Raises:
        RegroupError: anything that keeps the conversion from being right; nothing is left behind.

    Example:
        >>> regroup.convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", kv_heads=8)  # doctest: +SKIP
    """
    target, listener = as_named(destination), listener or Listener()
    check_asked(asked, device, processes)
    existing_parent(target)  # refuses what can have no folder
    with open_source(
        str(source), revision=revision, allow_pickle=allow_pickle, scratch=target.absolute().parent
    ) as opened:
        plan, text = asked_plan(opened.layout, asked, processes)
        prepared = prepare(opened.checkpoint, opened.layout, plan)
        # What can be wrong with the destination or the text is said before weights are looked at.
        check_destination(target, opened.folder, prepared.nbytes + prepared.solved_bytes)
        batches: list[dict[str, torch.Tensor]] = []
        if text is not None:
            from ..calibration.text import calibration_batches

            batches = calibration_batches(text, opened.checkpoint.folder, opened.checkpoint.config)
            processes.shard(batches)  # refuses too many processes
        if dry_run:
            found = grouped(opened, plan, listener)
            listener.planned(opened, found, prepared.preview)
            time_and_disk = estimate(prepare(opened.checkpoint, opened.layout, found), target)
            return Conversion(None, prepared.preview, Result(found), estimate=time_and_disk)
        return carry_out(
            opened, prepared, target, batches, device=device, workers=workers, listener=listener, processes=processes
        )


def carry_out(
    opened: Source,
    prepared: Prepared,
    destination: Path,
    batches: Sequence[dict[str, torch.Tensor]] = (),
    *,
    settings: Settings | None = None,
    device: str | None = None,
    workers: int = 2,
    listener: Listener | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Conversion:
    """Solve what has to be solved, then write; or resume where a run that was killed stopped.

    Args:
        opened: the original model.
        prepared: the plan that is carried out, checked.
        destination: a folder that does not exist yet. It appears when everything in it is on the disk.
        batches: model inputs to calibrate on, if the plan asks for calibration.
        settings: of calibration; by default those that the plan asks for.
        device, workers, listener, processes: see ``convert``.

    Raises:
        RegroupError: bad destination, a source that changes, or a full disk; nothing is left behind.
    """
    started, listener, plan = time.perf_counter(), listener or Listener(), prepared.plan
    text = _digest(batches) if batches else None
    journal = Journal(opened.checkpoint, plan, prepared.preview.shards, text=text, notice=listener.notice)

    def worth_keeping() -> bool:
        kept = plan.calibration is not None and journal.has_solutions
        if kept:
            listener.notice("the layers that are solved are kept, and the same command resumes after them")
        return kept

    # Next to the result: solved layers, and the hidden states of both models while new ones take the place of old ones.
    tokens = (next(batch[name] for name in ("decoder_input_ids", "input_ids") if name in batch) for batch in batches)
    positions = sum(ids.numel() for ids in tokens)
    states = 2 * 2 * 4 * opened.layout.hidden_size * positions if processes.size == 1 else 0
    check_destination(destination, opened.folder, prepared.nbytes + prepared.solved_bytes + states)
    with staged_folder(destination, adopt=journal.adopt, keep=worth_keeping) as stage:
        journal.begin(stage)
        if journal.found is None:
            journal.find(grouped(opened, plan, listener))
        assert journal.found is not None
        listener.planned(opened, journal.found, prepared.preview)
        result = Result(journal.found)
        if plan.calibration is not None:
            asked = settings or Settings.of(plan)
            solved = _calibrate(opened, journal.found, batches, journal.store, asked, listener, device, processes)
            record = {**plan.calibration.to_json(), "repair": plan.repair, **solved.to_json()}
            record |= layers_compared(opened, solved.plan, batches, journal.store, asked, listener, device, processes)
            result = Result(spelled_out(solved.plan, opened.layout), record)
        elif prepared.solved:
            _solve(prepared, journal.found, journal.store, listener, workers)
        with listener.writing(prepared.preview.bytes_after) as count:
            write(prepared, result, stage, journal, name=opened.name, workers=workers, progress=count)
    return Conversion(destination, prepared.preview, result, time.perf_counter() - started)


def _solve(prepared: Prepared, plan: Plan, store: SolutionStore, listener: Listener, workers: int) -> None:
    """Solve layers from their weights; those that a killed run solved are there already."""
    checkpoint, tensors = prepared.checkpoint, prepared.checkpoint.tensors
    wants = {want.name: want for want in plan.layers}
    done = store.names()

    def work(name: str) -> None:
        if name not in done:
            store.keep(name, solve_by_weights(prepared.solved[name], wants[name], checkpoint.read, tensors))

    executor = ThreadPoolExecutor(max_workers=workers)
    try:
        with listener.stage("solving", len(prepared.solved), "layers") as count:
            for _ in executor.map(work, list(prepared.solved)):
                count(1)
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _calibrate(
    opened: Source,
    plan: Plan,
    batches: Sequence[dict[str, torch.Tensor]],
    store: SolutionStore,
    settings: Settings,
    listener: Listener,
    device: str | None,
    processes: ProcessGroup,
) -> Calibrated:
    # Running the model takes transformers' classes, which a conversion without text does not need.
    from ..calibration.calibrate import calibrate
    from ..devices import device_named
    from .assist import run_alongside

    folder, layers = opened.checkpoint.folder, opened.layout.layers[-1].index + 1
    place = device_named(processes.device(device))
    processes.call(run_alongside, folder, device, calibrate, plan, batches, None, settings)
    with listener.calibrating(layers) as count:
        solved = calibrate(
            opened.checkpoint,
            opened.layout,
            plan,
            batches,
            store,
            settings,
            device=place,
            progress=count,
            processes=processes,
        )
    listener.calibrated(solved)
    return solved


def _digest(batches: Sequence[dict[str, torch.Tensor]]) -> str:
    """Hash of model inputs, whatever file or data set they were read from."""
    found = hashlib.sha256()
    for batch in batches:
        for name, value in sorted(batch.items()):
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()
