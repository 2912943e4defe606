"""From what a user names to a finished checkpoint: the steps of `regroup convert` as one function."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .checkpoint import Checkpoint, fetch, is_hub_id, open_checkpoint, remote_headers
from .checkpoint.pickles import pickled_files, unpickle
from .checkpoint.writer import check_destination, existing_parent
from .convert import Conversion, preview
from .convert import convert as write_child
from .convert.stream import Progress
from .convert.text import CalibrationText, calibration_batches
from .layout import Layout, detect
from .plan import Plan, make_plan

if TYPE_CHECKING:
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
        return detect(*remote_headers(name, revision=revision))
    with open_source(name, revision=revision, allow_pickle=allow_pickle) as source:
        return source.layout


def convert_checkpoint(
    source: str | Path,
    destination: str | Path,
    *,
    kv_heads: int | None = None,
    layers: str | None = None,
    method: str = "auto",
    tensor_parallel: int = 1,
    seed: int = 0,
    plan: Plan | str | Path | None = None,
    calibration: CalibrationText | None = None,
    repair: str = "output",
    device: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    workers: int = 2,
    progress: Progress | None = None,
) -> Conversion:
    """Convert a multi-head checkpoint to grouped-query attention.

    Args:
        source: a checkpoint folder or a hub id.
        destination: a folder that does not exist yet; it appears when it is complete.
        kv_heads, layers, method, tensor_parallel, seed: what is wanted (see ``make_plan``), unless
        plan: says it: a Plan, or the path of one.
        calibration, repair, device: text to convert on, how to repair (see ``convert.calibrate.Settings``), and where.
        revision, allow_pickle: see ``open_source``.
        workers: threads.
        progress: called with the number of bytes just written.

    Returns:
        What was written.

    Raises:
        RegroupError: anything that keeps the conversion from being right; nothing is left behind.

    Example:
        >>> regroup.convert_checkpoint("meta-llama/Llama-2-7b-hf", "llama-2-7b-gqa8", kv_heads=8)  # doctest: +SKIP
    """
    target = Path(destination).expanduser()
    scratch = existing_parent(target)
    with open_source(str(source), revision=revision, allow_pickle=allow_pickle, scratch=scratch) as opened:
        chosen = choose_plan(
            opened.layout,
            plan,
            kv_heads=kv_heads,
            layers=layers,
            method=method,
            tensor_parallel=tensor_parallel,
            seed=seed,
        )
        check_destination(target, opened.folder, 0)
        with contextlib.ExitStack() as stack:
            given = None
            if calibration is not None:
                from .convert.calibrate import Settings

                settings = Settings(choose=plan is None and method == "auto", repair=repair)
                check_destination(target, opened.folder, preview(opened.checkpoint, opened.layout, chosen).bytes_after)
                solved = stack.enter_context(
                    calibrated(opened, chosen, calibration, settings, scratch=scratch, device=device)
                )
                chosen, given = solved.plan, solved.given
            return write_child(
                opened.checkpoint,
                opened.layout,
                chosen,
                target,
                given=given,
                parent=opened.name,
                workers=workers,
                progress=progress,
            )


@contextlib.contextmanager
def calibrated(
    opened: Source,
    plan: Plan,
    text: CalibrationText,
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
        text, settings: what to calibrate on, and how.
        scratch: a folder on a disk with room for the attention weights.
        device: where layers run; a GPU where there is one.
        progress: called with 1 after each decoder layer.

    Raises:
        RegroupError: see ``calibration_batches`` and ``calibrate``.
    """
    import torch

    # Running the parent takes transformers, which a conversion without text does not need.
    from .convert.calibrate import calibrate

    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches = calibration_batches(text, opened.checkpoint.folder, opened.checkpoint.config)
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
    method: str,
    tensor_parallel: int,
    seed: int,
) -> Plan:
    """The plan that was given, or one made from the rest; checked against the layout either way."""
    if plan is None:
        return make_plan(layout, kv_heads, layers=layers, method=method, tensor_parallel=tensor_parallel, seed=seed)
    chosen = plan if isinstance(plan, Plan) else Plan.load(Path(plan))
    chosen.check(layout)
    return chosen
