"""From what a user asks for to a plan: as a conversion would have it, or by layer within a KV budget."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

from ..errors import DegenerateTextError, RegroupError
from ..layout import Layout
from ..listener import Listener
from ..opening import Source, open_headers, open_source
from ..plans import OWN_TEXT_FILE, Plan, allocate, layer_units, parse_budget, spelled_out, token_bytes
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.grouping import weight_losses
from .request import Asked, check_asked, grouped, usual_calibration
from .text import Pending, possible_plan, ready, without_own_text

if TYPE_CHECKING:
    from ..calibration.sensitivity import Measured

T = TypeVar("T")


def plan(
    source: str | Path,
    *,
    kv_budget: str | None = None,
    device: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    listener: Listener | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
    **asked: Unpack[Asked],
) -> tuple[Plan, Layout]:
    """Plan a conversion; with a KV budget, find numbers of KV heads for each layer that keep the most of the model.

    Args:
        source: a checkpoint folder or a hub id.
        kv_budget: what the KV cache may take, such as ``"25%"`` of the original (see ``plans.parse_budget``), in the
            place of ``kv_heads`` and ``layers``.
        device, revision, allow_pickle, listener, processes: see ``convert``.
        asked: see ``Asked``; calibration is that of ``convert``, by default text that the model writes itself. Without
            a budget nothing is run on it: the plan is what ``convert`` would carry out, made from headers, and leaves
            methods and groups open where text is to choose them. From the weights alone, heads are grouped here if
            ``grouping`` is ``"search"``, and otherwise in the conversion. With a budget, each layer is converted to
            each number of KV heads on the text, and whole models are compared; from the weights alone the residual
            energies have to do.

    Returns:
        The plan and the layout that it is for. The plan names its calibration text, and with a budget the KL divergence
        to be expected on it.

    Raises:
        RegroupError: as ``convert``; a budget that cannot be read or met.
    """
    listener = listener or Listener()
    check_asked(usual_calibration(asked), device, processes)
    if kv_budget is None:
        config, layout = open_headers(str(source), revision=revision, allow_pickle=allow_pickle)
        made, text = possible_plan(config, layout, asked, listener, processes)
        if text is None and asked.get("grouping") == "search":
            with open_source(str(source), revision=revision, allow_pickle=allow_pickle) as opened:
                made = grouped(opened, made, listener)
        return made, layout
    if asked.get("kv_heads") is not None or asked.get("layers") is not None:
        raise RegroupError("a KV budget and numbers of KV heads were both given", remedy="give one of them")
    with open_source(str(source), revision=revision, allow_pickle=allow_pickle) as opened:
        layout = opened.layout
        whole: Asked = {**asked, "kv_heads": None, "layers": {}, "tensor_parallel": None}
        start, text = possible_plan(opened.checkpoint.config, layout, whole, listener, processes)
        try:
            made = _within(kv_budget, opened, start, asked.get("tensor_parallel"), listener, device, processes)
        except DegenerateTextError as error:
            start, _ = without_own_text(error, layout, start, text, listener)
            made = _within(kv_budget, opened, start, asked.get("tensor_parallel"), listener, device, processes)
    made = replace(made, kv_budget=kv_budget)
    made.check(layout)
    return made, layout


def _within(
    kv_budget: str,
    opened: Source,
    start: Plan,
    degree: int | None,
    listener: Listener,
    device: str | None,
    processes: ProcessGroup,
) -> Plan:
    """A plan whose KV cache fits the budget: the layers of the original model, narrowed.

    The original model's own KV heads, as in ``start``, need not fit ``degree`` devices.
    """
    layout = opened.layout
    start = replace(start, tensor_parallel=1 if degree is None else degree)
    units = [layer_units(layer, tensor_parallel=start.tensor_parallel) for layer in layout.layers]
    full = sum(token_bytes(layer, layer.num_key_value_heads) for layer in layout.layers)
    budget = parse_budget(kv_budget, full)
    # Said before anything is measured: a budget that cannot be met, and a method that cannot be used.
    allocate([dict.fromkeys(unit, 0.0) for unit in units], units, budget, full=full)
    least = (replace(want, num_key_value_heads=min(unit)) for want, unit in zip(start.layers, units, strict=True))
    replace(start, layers=tuple(least)).check(layout)
    choices = {layer.name: sorted(unit) for layer, unit in zip(layout.layers, units, strict=True)}
    if start.calibration is None:
        with listener.searching(len(layout.layers)) as count:
            lost = weight_losses(opened.checkpoint, layout, choices, progress=count)
        costs = [{heads: lost[layer.name][heads] for heads in choices[layer.name]} for layer in layout.layers]
        heads = allocate(costs, units, budget, full=full)
        narrowed = (replace(want, num_key_value_heads=g) for want, g in zip(start.layers, heads, strict=True))
        return grouped(opened, replace(start, layers=tuple(narrowed)), listener)
    from ..calibration.budgeted import plan_within

    found = _on_text(plan_within, opened, start, listener, device, processes, units, budget, stage=listener.stage)
    listener.chosen(found)
    # The prediction holds for a conversion on the same text.
    return replace(spelled_out(found.plan, layout), calibration=start.calibration, repair=start.repair)


def measured(
    opened: Source,
    start: Plan,
    choices: Mapping[str, Sequence[int]],
    listener: Listener,
    *,
    device: str | None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, dict[int, Measured]]:
    """What each layer loses at each number of KV heads, alone, on the plan's text (see ``sensitivity.measure``)."""
    from ..calibration.sensitivity import measure

    return _on_text(measure, opened, start, listener, device, processes, choices, stage=listener.stage)


def _on_text(
    work: Callable[..., T],
    opened: Source,
    start: Plan,
    listener: Listener,
    device: str | None,
    processes: ProcessGroup,
    *arguments: object,
    **own: object,
) -> T:
    """Have all processes do some work on the plan's text, without distillation.

    ``own`` are arguments of this process alone.
    """
    from ..calibration.settings import Settings
    from ..devices import device_named
    from .assist import run_alongside

    assert start.calibration is not None
    settings = Settings.of(start)
    if settings.repair == "distill":
        # Which layer bears what shows without it, in a fraction of the time.
        settings = replace(settings, repair="output")
    batches = ready(opened, start.calibration, processes, listener, device, settings=settings)
    if isinstance(batches, Pending):
        with tempfile.TemporaryDirectory(prefix="regroup-") as folder:
            batches = batches.batches(opened, Path(folder) / OWN_TEXT_FILE, listener, device, processes)
    place, given = device_named(processes.device(device)), (start, *arguments, batches, settings)
    processes.call(run_alongside, opened.checkpoint.folder, device, work, *given)
    return work(opened.checkpoint, opened.layout, *given, device=place, processes=processes, **own)
