"""From a KV budget to a plan: numbers of KV heads for each layer that keep the most of the model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, Unpack

from ..errors import DegenerateTextError, RegroupError
from ..layout import Layout
from ..listener import Listener
from ..opening import Source, open_layout, open_source
from ..plans import OWN_TEXT_FILE, Plan, allocate, layer_units, parse_budget, spelled_out, token_bytes
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..solver.grouping import weight_losses
from .request import Asked, asked_plan, calibration_of, check_asked, grouped, usual_calibration, weights_alone
from .text import Pending, ready, unless_impossible, without_own_text

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
        asked: see ``Asked``. Without a budget, heads are grouped as neighbours unless ``grouping`` is ``"search"``;
            with one, ``calibration`` is text on which each layer is converted to each number of KV heads, and whole
            models are compared; by default text that the model writes itself. With ``"none"`` the residual energies of
            the weights have to do.

    Returns:
        The plan and the layout that it is for. With calibration the plan holds the KL divergence to be expected.

    Raises:
        RegroupError: as ``convert``; a budget that cannot be read or met.
    """
    listener = listener or Listener()
    # The loss is measured unless that is ruled out: energies rank layers, and not always rightly.
    said, asked = asked, usual_calibration(asked) if kv_budget is not None else asked
    check_asked(asked, device, processes)
    text, grouping = calibration_of(asked), asked.get("grouping")
    if kv_budget is None and text is not None:
        raise RegroupError(
            "calibration text was given, and no KV budget to divide by it",
            remedy="pass --kv-budget, or give the text to `regroup convert`",
        )
    if kv_budget is not None and (asked.get("kv_heads") is not None or asked.get("layers") is not None):
        raise RegroupError("a KV budget and numbers of KV heads were both given", remedy="give one of them")
    if kv_budget is None and grouping != "search":
        # Headers are enough.
        layout = open_layout(str(source), revision=revision, allow_pickle=allow_pickle)
        return replace(asked_plan(layout, asked, processes)[0], grouping=None), layout
    with open_source(str(source), revision=revision, allow_pickle=allow_pickle) as opened:
        layout = opened.layout
        if kv_budget is None:
            return grouped(opened, asked_plan(layout, asked, processes)[0], listener), layout
        start = asked_plan(layout, {**asked, "kv_heads": None, "layers": {}, "tensor_parallel": None}, processes)[0]
        if text is not None and text.own:
            start, text = unless_impossible(opened, start, text, listener, asked_for=said is asked)
        try:
            made = _within(kv_budget, opened, start, asked.get("tensor_parallel"), listener, device, processes)
        except DegenerateTextError as error:
            assert text is not None
            listener.notice(without_own_text(f"{error.what}: {error.details.get('got')}", text.given))
            given = text.given
            start = weights_alone(start, layout) if given is None else replace(start, calibration=given)
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
    made = spelled_out(found.plan, layout)
    if start.calibration.own and start.calibration.data is None:
        # Whoever has the plan has this text, and the prediction holds for a conversion on it.
        made = replace(made, calibration=start.calibration, repair=start.repair)
    return made


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

    with listener.calibrating(opened.layout.layers[-1].index + 1) as count:
        return _on_text(measure, opened, start, listener, device, processes, choices, progress=count)


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
    """Have all processes do some work on the plan's text; ``own`` are arguments of this process alone."""
    from ..calibration.settings import Settings
    from ..devices import device_named
    from .assist import run_alongside

    assert start.calibration is not None
    batches = ready(opened, start.calibration, processes, listener, device)
    if isinstance(batches, Pending):
        with tempfile.TemporaryDirectory(prefix="regroup-") as folder:
            batches = batches.batches(opened, Path(folder) / OWN_TEXT_FILE, listener, processes.device(device))
        processes.shard(batches)  # refuses too many processes
    place, given = device_named(processes.device(device)), (start, *arguments, batches, Settings.of(start))
    processes.call(run_alongside, opened.checkpoint.folder, device, work, *given)
    return work(opened.checkpoint, opened.layout, *given, device=place, processes=processes, **own)
