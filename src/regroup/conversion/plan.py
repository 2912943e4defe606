"""From what a user asks for to a plan: G for every layer, which heads stand together, and on what text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..calibration.text import CalibrationText, calibration_batches
from ..errors import RegroupError
from ..layout import Layout
from ..listener import Listener
from ..opening import Source, open_layout, open_source
from ..plans import ASKED_METHODS, BLIND_METHODS, Plan, allocate, layer_units, make_plan, parse_budget, token_bytes
from ..processes import SINGLE_PROCESS, ProcessGroup

if TYPE_CHECKING:
    from ..calibration.layer_converter import Settings
    from ..calibration.sensitivity import Measured

GROUPINGS = ("contiguous", "search")
REPAIRS = ("none", "output", "distill")


def plan_checkpoint(
    source: str | Path,
    *,
    kv_heads: int | None = None,
    layers: str | None = None,
    kv_budget: str | None = None,
    method: str | None = None,
    grouping: str | None = None,
    tensor_parallel: int | None = None,
    seed: int | None = None,
    calibration: CalibrationText | None = None,
    repair: str = "output",
    device: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    listener: Listener | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> tuple[Plan, Layout]:
    """Plan a conversion, with a number of KV heads for each layer that keeps the most of the model in a given cache.

    Args:
        kv_budget: what the KV cache may take, such as ``"25%"`` of the parent's (see ``plan.parse_budget``); in place
            of ``kv_heads`` and ``layers``.
        grouping: see ``convert_checkpoint``; without a budget ``"contiguous"`` unless given.
        calibration: with a budget, text on which each layer is converted to each G, to see what that costs. Without
            it the weights' residual energies have to do.
        source, kv_heads, layers, method, tensor_parallel, seed, repair, device, revision, allow_pickle, listener,
        processes:
            see ``convert_checkpoint``.

    Returns:
        The plan and the layout that it is for. With calibration the plan holds the KL divergence to be expected.

    Raises:
        RegroupError: as ``convert_checkpoint``; a budget that cannot be read or met.
    """
    told = listener or Listener()
    check_text_options(repair, device, calibration, processes)
    wanted = {"method": method, "tensor_parallel": tensor_parallel, "seed": seed}
    if kv_budget is None:
        if calibration is not None:
            raise RegroupError(
                "calibration text was given, and no KV budget to divide by it",
                remedy="pass --kv-budget, or give the text to `regroup convert`",
            )
        if grouping != "search":
            searches(grouping, method, None)
            layout = open_layout(str(source), revision=revision, allow_pickle=allow_pickle)
            return choose_plan(layout, None, kv_heads=kv_heads, layers=layers, **wanted), layout
    elif kv_heads is not None or layers is not None:
        raise RegroupError("a KV budget and numbers of KV heads were both given", remedy="give one of them")
    with open_source(str(source), revision=revision, allow_pickle=allow_pickle) as opened:
        layout = opened.layout
        if kv_budget is None:
            plan = choose_plan(layout, None, kv_heads=kv_heads, layers=layers, **wanted)
            return grouped(opened, plan, told), layout
        search = searches(grouping, method, None)
        # The parent itself, of which layers are then narrowed; its own KV heads need not fit the devices.
        start = choose_plan(layout, None, kv_heads=None, layers={}, **{**wanted, "tensor_parallel": None})
        start = replace(start, tensor_parallel=1 if tensor_parallel is None else tensor_parallel)
        units = [layer_units(layer, tensor_parallel=start.tensor_parallel) for layer in layout.layers]
        full = sum(token_bytes(layer, layer.num_key_value_heads) for layer in layout.layers)
        budget = parse_budget(kv_budget, full)
        # Told before anything is measured: a budget that cannot be met, and a method that cannot be used.
        allocate([dict.fromkeys(unit, 0.0) for unit in units], units, budget, full=full)
        least = (replace(want, num_key_value_heads=min(unit)) for want, unit in zip(start.layers, units, strict=True))
        narrowest = replace(start, layers=tuple(least))
        narrowest.check(layout)
        if calibration is not None:
            check_for_text(narrowest)
        choices = {layer.name: sorted(unit) for layer, unit in zip(layout.layers, units, strict=True)}
        if calibration is None:
            plan = _divided_by_weights(opened, start, units, budget, full, told)
            plan = grouped(opened, plan, told) if search else plan
        else:
            found = measured(
                opened,
                start,
                choices,
                calibration,
                told,
                method=method,
                repair=repair,
                search=search,
                device=device,
                processes=processes,
            )
            costs = [{heads: one.kl for heads, one in found[layer.name].items()} for layer in layout.layers]
            heads = allocate(costs, units, budget, full=full)
            picked = [found[layer.name][number] for layer, number in zip(layout.layers, heads, strict=True)]
            plan = replace(
                start,
                layers=tuple(replace(one.want, predicted_kl=one.kl) for one in picked),
                predicted_kl=sum(one.kl for one in picked),
            )
    plan = replace(plan, kv_budget=kv_budget)
    plan.check(layout)
    return plan, layout


def measured(
    opened: Source,
    start: Plan,
    choices: Mapping[str, Sequence[int]],
    calibration: CalibrationText,
    told: Listener,
    *,
    method: str | None,
    repair: str,
    search: bool,
    device: str | None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> dict[str, dict[int, Measured]]:
    """What each layer loses at each number of KV heads, alone (see ``convert.sensitivity.measure``)."""
    from ..calibration.sensitivity import measure
    from ..devices import device_named

    settings = settings_for(start, repair, choose=method in (None, "auto"), search=search)
    batches = calibration_batches(calibration, opened.checkpoint.folder, opened.checkpoint.config)
    place = device_named(processes.device(device))
    processes.call(along, opened.checkpoint.folder, device, measure, start, choices, batches, settings)
    with told.calibrating(opened.layout.layers[-1].index + 1) as count:
        return measure(
            opened.checkpoint,
            opened.layout,
            start,
            choices,
            batches,
            settings,
            device=place,
            progress=count,
            processes=processes,
        )


def along(
    folder: Path, device: str | None, work: Callable[..., object], *arguments: object, processes: ProcessGroup
) -> None:
    """What a process does that helps the first one: ``work`` on the same checkpoint, with the same arguments."""
    from ..devices import device_named

    place = device_named(processes.device(device))
    with open_source(str(folder)) as opened:
        work(opened.checkpoint, opened.layout, *arguments, device=place, processes=processes)


def searches(grouping: str | None, method: str | None, plan: Plan | str | Path | None) -> bool:
    """Whether heads that belong together are searched for.

    Raises:
        RegroupError: not a way to group heads, or one beside a plan.
    """
    if grouping not in (None, *GROUPINGS):
        raise RegroupError("the grouping is not known", expected=" or ".join(GROUPINGS), got=grouping)
    if plan is not None and grouping is not None:
        raise RegroupError(
            "a plan and a grouping were both given", remedy="the plan's query_order says how heads stand"
        )
    return plan is None and (method in (None, "auto") if grouping is None else grouping == "search")


def check_repair(repair: str) -> None:
    """Refuse a repair that is not one of ``REPAIRS``."""
    if repair not in REPAIRS:
        raise RegroupError("the repair is not known", expected=", ".join(REPAIRS), got=repair)


def check_text_options(
    repair: str, device: str | None, calibration: CalibrationText | None, processes: ProcessGroup = SINGLE_PROCESS
) -> None:
    """Refuse what calibration could not use, before anything is read.

    Raises:
        RegroupError: an unknown repair, a device that is not there, or several processes and no text for them.
    """
    check_repair(repair)
    if calibration is not None:
        from ..devices import device_named

        device_named(processes.device(device))
    elif processes.size > 1:
        raise RegroupError(
            "several processes were started, and there is no calibration text for them to share",
            expected="--calibration, or one process",
            got=f"{processes.size} processes",
            remedy="run the command without a launcher",
        )


def check_for_text(plan: Plan) -> None:
    """Refuse methods that text has nothing to say about: what is solved on it is a linear map.

    Raises:
        RegroupError: naming the first such layer.
    """
    for want in plan.layers:
        unsolved = {want.key_method, want.value_method} & set(BLIND_METHODS)
        if want.changes and unsolved:
            raise RegroupError(
                "calibration text was given, and a method that does not look at it",
                layer=want.name,
                expected=" or ".join(m for m in ASKED_METHODS if m not in BLIND_METHODS),
                got=" and ".join(sorted(unsolved)),
                remedy="leave out --calibration, or choose another method",
            )


def grouped(opened: Source, plan: Plan, told: Listener, *, shared_only: bool = False) -> Plan:
    """The plan with heads grouped by the weights."""
    from ..solver.grouping import search_plan

    with told.searching(len(plan.layers)) as count:
        return search_plan(opened.checkpoint, opened.layout, plan, shared_only=shared_only, progress=count)


def _divided_by_weights(
    opened: Source, plan: Plan, units: list[dict[int, int]], budget: int, full: int, told: Listener
) -> Plan:
    """A budget divided by the energy that each layer would lose."""
    from ..calibration.sensitivity import guess

    with told.searching(len(plan.layers)) as count:
        choices = {want.name: list(unit) for want, unit in zip(plan.layers, units, strict=True)}
        guessed = guess(opened.checkpoint, opened.layout, choices, progress=count)
    costs = [
        {heads: guessed[want.name][heads] for heads in unit} for want, unit in zip(plan.layers, units, strict=True)
    ]
    heads = allocate(costs, units, budget, full=full)
    changed = (replace(want, num_key_value_heads=g) for want, g in zip(plan.layers, heads, strict=True))
    return replace(plan, layers=tuple(changed))


def settings_for(plan: Plan, repair: str, *, choose: bool, search: bool) -> Settings:
    """How to calibrate by a plan: its seed, and what is left open; see ``convert.attention.Settings``."""
    from ..calibration.layer_converter import Settings

    return Settings(choose=choose, repair=repair, search=search, seed=plan.seed)


def choose_plan(
    layout: Layout,
    plan: Plan | str | Path | None,
    *,
    kv_heads: int | None,
    layers: str | Mapping[str, int] | None,
    method: str | None,
    tensor_parallel: int | None,
    seed: int | None,
) -> Plan:
    """The plan that was given, or one made from the rest; checked against the layout either way.

    Raises:
        RegroupError: both were given, the file is no plan, or the layout does not allow it.
    """
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
