"""From what a user names to a finished checkpoint: the steps of `regroup convert` as one function."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from ..calibration.settings import Settings
from ..checkpoint import staged_folder
from ..checkpoint.writer import check_destination, copy_file, existing_parent
from ..errors import DegenerateTextError
from ..files import as_named
from ..listener import Listener
from ..opening import Source, open_source
from ..plans import OWN_TEXT_FILE, CalibrationText, Plan, Result, spelled_out
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.solve import solve_by_weights
from ..solver.store import SolutionStore
from ..writer.estimate import Estimate, estimate
from ..writer.journal import Journal
from ..writer.preview import Prepared, Preview, prepare
from ..writer.write import write
from .costs import layers_compared
from .judged import judged
from .request import Asked, check_asked, grouped, usual_calibration
from .text import Pending, possible_plan, ready, without_own_text

if TYPE_CHECKING:
    import torch

    from ..calibration.calibrate import Calibrated
    from .text import Batches


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
    keep_calibration: bool = True,
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
        keep_calibration: keep the calibration text that the original model writes itself in the converted model
            (``regroup_calibration.jsonl``), from which the conversion can be reproduced.
        listener: for progress and notices.
        processes: those that share the calibration text, of which this one is the first; the others ``assist`` (see
            ``processes.launched``). They read the source from the same path.
        asked: ``kv_heads``, ``layers``, ``method``, ``grouping``, ``tensor_parallel``, ``seed``, ``calibration`` and
            ``repair``, or a ``plan``: see ``Asked``. Without a plan, calibration text or a method, the original model
            writes the text itself; where it cannot, the weights alone are used, and a notice says why.

    Returns:
        What was written, or would be.

    Raises:
        RegroupError: anything that keeps the conversion from being right; nothing is left behind.

    Example:
        >>> regroup.convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", kv_heads=8)  # doctest: +SKIP
    """
    target, listener = as_named(destination), listener or Listener()
    check_asked(usual_calibration(asked), device, processes)
    existing_parent(target)  # refuses what can have no folder
    with open_source(
        str(source), revision=revision, allow_pickle=allow_pickle, scratch=target.absolute().parent
    ) as opened:
        plan, text = possible_plan(opened.checkpoint.config, opened.layout, asked, listener, processes)
        prepared = prepare(opened.checkpoint, opened.layout, plan)
        # What can be wrong with the destination or the text is said before weights are looked at.
        check_destination(target, opened.folder, prepared.nbytes + prepared.solved_bytes)

        def text_for(plan: Plan, text: CalibrationText | None) -> Batches | Pending:
            if text is None:
                return ()
            return ready(opened, text, processes, listener, device, settings=Settings.of(plan))

        if dry_run:
            text_for(plan, text)
            found = grouped(opened, plan, listener)
            listener.planned(opened, found, prepared.preview)
            time_and_disk = estimate(prepare(opened.checkpoint, opened.layout, found), target)
            return Conversion(None, prepared.preview, Result(found), estimate=time_and_disk)
        rest: dict[str, Any] = {"device": device, "workers": workers, "listener": listener, "processes": processes}
        try:
            return carry_out(opened, prepared, target, text_for(plan, text), keep_text=keep_calibration, **rest)
        except DegenerateTextError as error:
            # Nothing is left of it. What was given besides is text all the same.
            plan, text = without_own_text(error, opened.layout, plan, text, listener)
            prepared = prepare(opened.checkpoint, opened.layout, plan)
            return carry_out(opened, prepared, target, text_for(plan, text), **rest)


def carry_out(
    opened: Source,
    prepared: Prepared,
    destination: Path,
    batches: Sequence[dict[str, torch.Tensor]] | Pending = (),
    *,
    keep_text: bool = True,
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
        batches: model inputs to calibrate on, if the plan asks for calibration, or what the model is to write.
        keep_text: keep what it wrote in the result.
        settings: of calibration; by default those that the plan asks for.
        device, workers, listener, processes: see ``convert``.

    Raises:
        DegenerateTextError: what the model writes is no text; nothing is left behind.
        RegroupError: bad destination, a source that changes, or a full disk; nothing is left behind.
    """
    started, listener, plan = time.perf_counter(), listener or Listener(), prepared.plan
    pending = batches if isinstance(batches, Pending) else None
    text = None if not batches else batches.digest() if isinstance(batches, Pending) else _digest(batches)
    journal = Journal(opened.checkpoint, plan, prepared.preview.shards, text=text, notice=listener.notice)

    def worth_keeping() -> bool:
        kept = plan.calibration is not None and journal.has_solutions
        if kept:
            listener.notice("the layers that are solved are kept, and the same command resumes after them")
        elif pending is not None and journal.has_text:
            listener.notice("the text that the model wrote is kept, and the same command resumes with it")
            return True
        return kept

    # Next to the result: solved layers, and the hidden states of both models while new ones take the place of old ones.
    positions = batches.positions if isinstance(batches, Pending) else _positions(batches)
    states = 2 * 2 * 4 * opened.layout.hidden_size * positions if processes.size == 1 else 0
    check_destination(destination, opened.folder, prepared.nbytes + prepared.solved_bytes + states)
    with staged_folder(destination, adopt=journal.adopt, keep=worth_keeping) as stage:
        journal.begin(stage)
        if isinstance(batches, Pending):
            batches = batches.batches(opened, journal.written, listener, device, processes)
        if journal.found is None:
            journal.find(grouped(opened, plan, listener))
        assert journal.found is not None
        listener.planned(opened, journal.found, prepared.preview)
        result = Result(journal.found)
        if plan.calibration is not None:
            from ..calibration.quality import set_apart

            asked = settings or Settings.of(plan)
            batches, unseen, separate = set_apart(batches)
            solved = _calibrate(opened, journal.found, batches, journal.store, asked, listener, device, processes)
            quality, best = judged(opened, plan, solved.plan, unseen, separate, journal.store, listener, device)
            record = {**plan.calibration.to_json(), "repair": plan.repair, **solved.to_json()}
            pooled = best is not solved.plan
            record["quality"] = {**quality.to_json(), "pooled": pooled}
            if pooled:
                # As by the method "mean": the solutions are left aside, and heads are pooled as they are written.
                prepared = replace(prepared, solved={})
            else:
                record |= layers_compared(opened, best, batches, journal.store, asked, listener, device, processes)
            if pending is not None:
                record["self_written"] = pending.describe(journal.written, stays=keep_text)
                if keep_text:
                    copy_file(journal.written, stage / OWN_TEXT_FILE)
            result = Result(spelled_out(best, opened.layout), record)
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


def _positions(batches: Sequence[dict[str, torch.Tensor]]) -> int:
    """Positions of the decoder; without text the models' classes are not imported."""
    if not batches:
        return 0
    from ..calibration.joint import token_count

    return token_count(batches)


def _digest(batches: Sequence[dict[str, torch.Tensor]]) -> str:
    """Hash of model inputs."""
    from ..calibration.text import digest

    return digest(batches)
