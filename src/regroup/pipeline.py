"""From what a user names to a finished checkpoint: the steps of `regroup convert` as one function."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, fetch, headers_of, is_hub_id, open_checkpoint
from .checkpoint.pickles import pickled_files, unpickle
from .checkpoint.writer import check_destination, existing_parent
from .convert import Conversion, Preview, prepare, write
from .convert.text import CalibrationText, calibration_batches
from .errors import RegroupError
from .layout import Layout, detect
from .plan import Plan, make_plan

if TYPE_CHECKING:
    import torch

    from .convert.calibrate import Calibrated, Settings


@dataclass(frozen=True)
class Source:
    """A parent, opened and understood."""

    name: str
    folder: Path  # where it was found; the checkpoint itself may be a copy of unpickled weights
    checkpoint: Checkpoint
    layout: Layout

    @property
    def ignores_code(self) -> bool:
        """True if the folder asks for code of its own, which is neither run nor carried along."""
        return "auto_map" in self.checkpoint.config and "regroup" not in self.checkpoint.config


@contextlib.contextmanager
def open_source(
    name: str, *, revision: str | None = None, allow_pickle: bool = False, scratch: Path | None = None
) -> Iterator[Source]:
    """Open a checkpoint folder or hub id and detect its layout.

    Args:
        name: a folder, or a hub id (downloaded).
        revision: of the hub repository.
        allow_pickle: read pickled weights, with torch's restricted unpickler, where there is nothing else.
        scratch: a folder on a disk with room for the weights, used only for pickles.

    Raises:
        RegroupError: not to be found, damaged, unknown, or only there as a pickle.
    """
    folder = found = fetch(name, revision=revision, pickles=allow_pickle)
    with contextlib.ExitStack() as stack:
        if allow_pickle and pickled_files(folder):
            copy = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".regroup-pickle-", dir=scratch)))
            unpickle(folder, copy)
            folder = copy
        checkpoint = open_checkpoint(folder)
        yield Source(name, found, checkpoint, detect(checkpoint.config, checkpoint.tensors))


def open_layout(name: str, *, revision: str | None = None, allow_pickle: bool = False) -> Layout:
    """The layout alone; of a hub repository from its headers, without downloading a weight.

    Raises:
        RegroupError: as ``open_source``.
    """
    if not Path(name).expanduser().exists() and is_hub_id(name) and not allow_pickle:
        return detect(*headers_of(name, revision=revision))
    with open_source(name, revision=revision, allow_pickle=allow_pickle) as source:
        return source.layout


class Listener:
    """Told how a conversion goes on; this one does not listen. The command line shows tables and progress bars."""

    def planned(self, source: Source, plan: Plan, ahead: Preview) -> None:
        """Everything is checked and nothing is written yet."""

    def calibrating(self, layers: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something to call with 1 after each decoder layer."""
        return contextlib.nullcontext(lambda count: None)

    def calibrated(self, solved: Calibrated) -> None:
        """What calibration chose."""

    def writing(self, nbytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something to call, from any thread, with the number of bytes just written."""
        return contextlib.nullcontext(lambda count: None)


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    kv_heads: int | None = None,
    layers: str | None = None,
    method: str | None = None,
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
) -> Conversion:
    """Convert a multi-head checkpoint to grouped-query attention.

    Args:
        source: a checkpoint folder or a hub id.
        destination: a folder that does not exist yet; it appears when it is complete.
        kv_heads, layers, method, tensor_parallel, seed: what is wanted (see ``make_plan``; the method is ``"auto"`` by
            default), unless
        plan: says it: a Plan, or the path of one.
        calibration: text to convert on; without it only the weights are looked at.
        repair: with calibration, ``"none"``, ``"output"`` or ``"distill"`` (see ``convert.calibrate.Settings``).
        device: where calibration runs; a GPU where there is one.
        revision, allow_pickle: see ``open_source``.
        workers: threads that write.
        dry_run: check everything, write nothing.
        listener: told how it goes on.

    Returns:
        What was written, or would be.

    Raises:
        RegroupError: anything that keeps the conversion from being right; nothing is left behind.

    Example:
        >>> regroup.convert_checkpoint("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", kv_heads=8)  # doctest: +SKIP
    """
    target, told = Path(destination).expanduser(), listener or Listener()
    scratch = existing_parent(target)
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
        ready = prepare(checkpoint, layout, chosen, parent=opened.name)
        told.planned(opened, chosen, ready.preview)
        check_destination(target, opened.folder, ready.nbytes)
        if calibration is not None:
            from .convert.calibrate import Settings

            settings = Settings(choose=plan is None and method in (None, "auto"), repair=repair)
            batches = calibration_batches(calibration, checkpoint.folder, checkpoint.config)
            if not dry_run:
                count = stack.enter_context(told.calibrating(layout.layers[-1].index + 1))
                solved = stack.enter_context(
                    calibrated(opened, chosen, batches, settings, scratch=scratch, device=device, progress=count)
                )
                told.calibrated(solved)
                record = {**calibration.describe(), "repair": repair, "layers": solved.to_json()}
                ready = prepare(
                    checkpoint, layout, solved.plan, parent=opened.name, given=solved.given, calibration=record
                )
        if dry_run:
            return Conversion(None, ready.preview, ready.plan.digest(), 0.0)
        progress = stack.enter_context(told.writing(ready.preview.bytes_after))
        return write(ready, target, workers=workers, progress=progress)


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
) -> Iterator[Calibrated]:
    """Carry out a plan on calibration text; the solved tensors lie in a scratch folder while the block lasts.

    Args:
        opened: the parent.
        plan: what is wanted of it; the methods in it count unless ``settings.choose``.
        batches, settings: what to calibrate on, and how.
        scratch: a folder on a disk with room for the attention weights.
        device: where layers run; a GPU where there is one.
        progress: called with 1 after each decoder layer.

    Raises:
        RegroupError: see ``calibrate``.
    """
    # Running the parent takes transformers, which a conversion without text does not need.
    from .convert.calibrate import calibrate
    from .devices import device_named

    place = device_named(device)
    with tempfile.TemporaryDirectory(prefix=".regroup-solved-", dir=scratch) as folder:
        yield calibrate(
            opened.checkpoint, opened.layout, plan, batches, Path(folder), settings, device=place, progress=progress
        )


def choose_plan(
    layout: Layout,
    plan: Plan | str | Path | None,
    *,
    kv_heads: int | None,
    layers: str | None,
    method: str | None,
    tensor_parallel: int | None,
    seed: int | None,
) -> Plan:
    """The plan that was given, or one made from the rest; checked against the layout either way."""
    if plan is None:
        return make_plan(
            layout,
            kv_heads,
            layers=layers,
            method=method or "auto",
            tensor_parallel=1 if tensor_parallel is None else tensor_parallel,
            seed=seed or 0,
        )
    if any(part is not None for part in (kv_heads, layers, method, tensor_parallel, seed)):
        raise RegroupError(
            "a plan and its parts were both given", remedy="give a plan, or KV heads, layers, method and the like"
        )
    chosen = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
    chosen.check(layout)
    return chosen
