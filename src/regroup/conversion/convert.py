"""From what a user names to a finished checkpoint: the steps of `regroup convert` as one function."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.text import CalibrationText, calibration_batches
from ..checkpoint import scratch_folder
from ..checkpoint.writer import check_destination, existing_parent
from ..files import as_named
from ..listener import Listener
from ..opening import Source, open_source
from ..plans import Plan
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..writer import Conversion, foretell, prepare, write
from ..writer.journal import earlier_plan
from .plan import along, check_for_text, check_text_options, choose_plan, grouped, searches, settings_for

if TYPE_CHECKING:
    import torch

    from ..calibration.calibrate import Calibrated
    from ..calibration.layer_converter import Settings


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    kv_heads: int | None = None,
    layers: str | None = None,
    method: str | None = None,
    grouping: str | None = None,
    tensor_parallel: int | None = None,
    seed: int | None = None,
    plan: Plan | str | Path | None = None,
    calibration: CalibrationText | None = None,
    repair: str = "output",
    device: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    workers: int = 2,
    dry_run: bool = False,
    listener: Listener | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Conversion:
    """Convert a multi-head checkpoint to grouped-query attention.

    Args:
        source: a checkpoint folder or a hub id.
        destination: a folder that does not exist yet; it appears when it is complete. A conversion to it that was
            killed is gone on with where it had the same source and plan.
        kv_heads, layers, method, tensor_parallel, seed: what is wanted, as for ``make_plan``, but that the method is
            ``"auto"`` by default. Not beside ``plan``.
        grouping: ``"contiguous"`` or ``"search"`` for heads that belong together; by default the search with the method
            ``"auto"``, neighbours with any other.
        plan: what is wanted, in the place of all these: a Plan, or the path of one.
        calibration: text to convert on; without it only the weights are looked at.
        repair: with calibration, ``"none"``, ``"output"`` or ``"distill"`` (see ``convert.attention.Settings``).
        device: where calibration runs; a GPU where there is one.
        revision: branch, tag or commit of a hub repository.
        allow_pickle: read pickled weights, with torch's restricted unpickler, where there is nothing else.
        workers: threads that write.
        dry_run: check everything, write nothing, and foretell time and disk.
        listener: told how it goes on.
        processes: the processes that share the calibration text, which this one leads; the others ``assist`` (see
            ``processes.launched``). They read the source from the same path.

    Returns:
        What was written, or would be.

    Raises:
        RegroupError: anything that keeps the conversion from being right; nothing is left behind.

    Example:
        >>> regroup.convert("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", kv_heads=8)  # doctest: +SKIP
    """
    target, told = as_named(destination), listener or Listener()
    check_text_options(repair, device, calibration, processes)
    existing_parent(target)  # refuses what can have no folder
    scratch = target.absolute().parent
    with contextlib.ExitStack() as stack:
        opened = stack.enter_context(
            open_source(str(source), revision=revision, allow_pickle=allow_pickle, scratch=scratch)
        )
        checkpoint, layout = opened.checkpoint, opened.layout
        chosen = choose_plan(
            layout,
            plan,
            kv_heads=kv_heads,
            layers=layers,
            method=method,
            tensor_parallel=tensor_parallel,
            seed=seed,
        )
        if calibration is not None:
            check_for_text(chosen)
        search = searches(grouping, method, plan)
        # What can be wrong with the destination or the text is said before weights are looked at.
        ready = prepare(checkpoint, layout, chosen, parent=opened.name)
        check_destination(target, opened.folder, ready.nbytes)
        batches = []
        if calibration is not None:
            batches = calibration_batches(calibration, checkpoint.folder, checkpoint.config)
            processes.shard(batches)  # refuses too many processes
        asked = chosen.digest() if search else None
        earlier = earlier_plan(target, checkpoint, asked) if asked is not None and calibration is None else None
        if earlier is not None:
            chosen = earlier
            ready = prepare(checkpoint, layout, chosen, parent=opened.name)
        elif search:
            # Text groups heads better than weights do, where layers may be grouped one at a time.
            chosen = grouped(opened, chosen, told, shared_only=calibration is not None)
            ready = prepare(checkpoint, layout, chosen, parent=opened.name)
        told.planned(opened, chosen, ready.preview)
        if calibration is not None:
            settings = settings_for(chosen, repair, choose=plan is None and method in (None, "auto"), search=search)
            if not dry_run:
                with told.calibrating(layout.layers[-1].index + 1) as count:
                    solved = stack.enter_context(
                        calibrated(
                            opened,
                            chosen,
                            batches,
                            settings,
                            scratch=scratch,
                            device=device,
                            progress=count,
                            processes=processes,
                        )
                    )
                told.calibrated(solved)
                record = {**calibration.describe(), "repair": repair, **solved.to_json()}
                ready = prepare(
                    checkpoint, layout, solved.plan, parent=opened.name, given=solved.given, calibration=record
                )
        if dry_run:
            return Conversion(None, ready.preview, ready.plan.digest(), 0.0, foretell(ready, target))
        progress = stack.enter_context(told.writing(ready.preview.bytes_after))
        return write(ready, target, workers=workers, progress=progress, asked=asked, notice=told.notice)


@contextlib.contextmanager
def calibrated(
    opened: Source,
    plan: Plan,
    batches: list[dict[str, torch.Tensor]],
    settings: Settings,
    *,
    scratch: Path,
    device: str | None = None,
    progress: Callable[[int], None] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> Iterator[Calibrated]:
    """Carry out a plan on calibration text; the solved tensors lie in a scratch folder while the block lasts.

    Args:
        opened: the parent.
        plan: what is wanted of it; the methods in it count unless ``settings.choose``.
        batches, settings: what to calibrate on, and how.
        scratch: a folder on a disk with room for the attention weights.
        device: where layers run; a GPU where there is one.
        progress: called with 1 after each decoder layer.
        processes: see ``convert_checkpoint``.

    Raises:
        RegroupError: see ``calibrate``.
    """
    # Running the parent takes transformers, which a conversion without text does not need.
    from ..calibration.calibrate import calibrate
    from ..devices import device_named

    place = device_named(processes.device(device))
    with scratch_folder(scratch, ".regroup-solved-") as folder:
        processes.call(along, opened.checkpoint.folder, device, calibrate, plan, batches, None, settings)
        yield calibrate(
            opened.checkpoint,
            opened.layout,
            plan,
            batches,
            folder,
            settings,
            device=place,
            progress=progress,
            processes=processes,
        )
