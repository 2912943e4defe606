"""From what a user asks for to a plan, checked before anything is read that takes long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from ..errors import RegroupError
from ..files import as_named
from ..layout import Layout
from ..listener import Listener
from ..opening import Source
from ..plans import (
    DEFAULT_REPAIR,
    NO_TEXT,
    OWN_TEXT,
    REPAIRS,
    CalibrationText,
    Plan,
    make_plan,
    spelled_out,
)
from ..processes import ProcessGroup

GROUPINGS = ("contiguous", "search")


class Asked(TypedDict, total=False):
    """What may be asked of a conversion: a plan, or what it is made from.

    Attributes:
        kv_heads: KV heads of every layer that ``layers`` does not name.
        layers: KV heads of ranges of layers, such as ``"0-3:8,4-31:4"`` (see ``plans.make_plan``).
        method: ``"auto"`` (the default), ``"mean"``, ``"first"``, ``"random"``, ``"lowrank"`` or ``"procrustes"``.
        grouping: ``"contiguous"``, or ``"search"`` for heads that belong together; by default the search with the
            method ``"auto"``, neighbours with any other.
        tensor_parallel: number of devices that will share each layer.
        seed: of the method ``"random"``, and of the search.
        plan: a Plan or the path of one, in the place of all these. Calibration text may be given with it: where the
            plan names text, as the place of that text.
        calibration: text to convert on, as a ``CalibrationText`` or as the command line says it (``"none"``,
            ``"self"``, ``"self:TOKENS"``, a file, ``"self,FILE"``). By default the model writes its own where the
            method is ``"auto"``; otherwise only the weights are used.
        repair: with calibration ``"none"``, ``"output"`` or ``"distill"`` (the default) (see ``calibration.Settings``).
    """

    kv_heads: int | None
    layers: str | Mapping[str, int] | None
    method: str | None
    grouping: str | None
    tensor_parallel: int | None
    seed: int | None
    plan: Plan | str | Path | None
    calibration: CalibrationText | str | Path | None
    repair: str | None


_TYPES: dict[str, type | tuple[type, ...]] = {
    "kv_heads": int,
    "layers": (str, Mapping),
    "method": str,
    "grouping": str,
    "tensor_parallel": int,
    "seed": int,
    "plan": (Plan, str, Path),
    "calibration": (CalibrationText, str, Path),
    "repair": str,
}


def calibration_of(asked: Asked) -> CalibrationText | None:
    """The calibration text that is asked for, or None.

    Raises:
        RegroupError: it is said in a way that cannot be read.
    """
    text = asked.get("calibration")
    return CalibrationText.parse(text, seed=asked.get("seed") or 0) if isinstance(text, str | Path) else text


def usual_calibration(asked: Asked) -> Asked:
    """The same with text of the model's own where nothing is said of text, and no method that needs none is named."""
    unsaid = asked.get("calibration") is None
    return {**asked, "calibration": OWN_TEXT} if unsaid and calibrated_by_default(asked) else asked


def calibrated_by_default(asked: Asked) -> bool:
    """Whether a conversion is calibrated where nothing is said of text."""
    return asked.get("plan") is None and asked.get("method") in (None, "auto")


def weights_alone(plan: Plan, layout: Layout) -> Plan:
    """A plan that is carried out from the weights, in the place of one with calibration text."""
    return replace(spelled_out(plan, layout), grouping=plan.grouping)


def check_asked(asked: Asked, device: str | None, processes: ProcessGroup) -> None:
    """Refuse what contradicts itself or cannot be, before anything is read.

    Raises:
        TypeError: a keyword that ``Asked`` does not have, or a value of another type.
        RegroupError: an unknown grouping, a plan and its parts, a device that is not there, or several processes and no
            text for them.
    """
    for name, value in asked.items():
        if name not in _TYPES:
            raise TypeError(f"unexpected keyword argument {name!r}; there are {', '.join(_TYPES)}")
        if value is not None and (not isinstance(value, _TYPES[name]) or isinstance(value, bool)):
            raise TypeError(f"{name} is not {_TYPES[name]}: {value!r}")
    grouping, plan = asked.get("grouping"), asked.get("plan")
    if grouping not in (None, *GROUPINGS):
        raise RegroupError("the grouping is not known", expected=" or ".join(GROUPINGS), got=grouping)
    if plan is not None and grouping is not None:
        raise RegroupError(
            "a plan and a grouping were both given", remedy="the plan's query_order says how heads are grouped"
        )
    parts = ("kv_heads", "layers", "method", "tensor_parallel", "seed")
    if plan is not None and any(asked.get(part) is not None for part in parts):
        raise RegroupError(
            "a plan and its parts were both given", remedy="give a plan, or KV heads, layers, method and the like"
        )
    repair = asked.get("repair")
    if repair not in (None, *REPAIRS):
        raise RegroupError("the repair is not known", expected=", ".join(REPAIRS), got=repair)
    if calibration_of(asked) is not None:
        from ..devices import device_named

        device_named(processes.device(device))
    elif processes.size > 1 and plan is None:
        raise _needless(processes)


def asked_plan(layout: Layout, asked: Asked, processes: ProcessGroup) -> tuple[Plan, CalibrationText | None]:
    """The plan that was given, or one made from the rest; checked against the layout either way.

    Returns:
        The plan, and the calibration text where it is now: a plan that was given names it as it was called then.

    Raises:
        RegroupError: the file is no plan, the layout does not allow it, or the text is not the plan's.
    """
    given, text, repair = asked.get("plan"), calibration_of(asked), asked.get("repair")
    if given is None:
        method, grouping = asked.get("method") or "auto", asked.get("grouping")
        search = method == "auto" if grouping is None else grouping == "search"
        degree = asked.get("tensor_parallel")
        text = None if text is None else text.hashed()
        plan = make_plan(
            layout,
            asked.get("kv_heads"),
            layers=asked.get("layers"),
            method=method,
            tensor_parallel=1 if degree is None else degree,
            seed=asked.get("seed") or 0,
            grouping="search" if search else None,
            calibration=text,
            repair=repair,
        )
        return plan, text
    plan = given if isinstance(given, Plan) else Plan.load(Path(given))
    if plan.calibration is not None and asked.get("calibration") == NO_TEXT:
        plan = weights_alone(plan, layout)
    elif plan.calibration is not None:
        text = _found_text(plan.calibration, text, given)
        plan = replace(plan, calibration=replace(plan.calibration, sha256=text.sha256), repair=repair or plan.repair)
    elif text is not None:
        text = text.hashed()
        plan = replace(plan, calibration=text, repair=repair or DEFAULT_REPAIR)
    elif processes.size > 1:
        raise _needless(processes)
    plan.check(layout)
    return plan, text


def grouped(opened: Source, plan: Plan, listener: Listener) -> Plan:
    """The plan with the groups that a search by weights finds, if it asks for one.

    With calibration text, layers with an order of their own are still to be searched on it; otherwise the plan that is
    returned asks for no search.
    """
    if plan.grouping != "search":
        return plan
    from ..solver.grouping import group_by_weights

    with listener.searching(len(plan.layers)) as count:
        found = group_by_weights(opened.checkpoint, opened.layout, plan, progress=count)
    return found if plan.calibration is not None else spelled_out(found, opened.layout)


def _found_text(wanted: CalibrationText, given: CalibrationText | None, plan: object) -> CalibrationText:
    """The text that a plan names: where the user says it is, next to the plan, or where its name leads.

    Where the model writes text itself, a file that was given may be that text.
    """
    if wanted.own and given is not None and given.data is not None and not given.own:
        written = as_named(given.data)
        if wanted.data is None or _holds_ids(written):
            return replace(_found_text(wanted, None, plan), written=written)
    if given is not None and given.own and not wanted.own:
        raise RegroupError(
            "the plan names calibration text, and none that the model writes itself",
            expected=wanted.name,
            got=given.name,
            remedy="leave --calibration out, or change the plan",
        )
    if given is not None:
        usual = CalibrationText.parse(given.name) if given.own else CalibrationText(given.data)
        for name in ("tokens", "window", "batch", "document_starts", "seed"):
            if getattr(given, name) not in (getattr(wanted, name), getattr(usual, name)):
                raise RegroupError(
                    f"the plan and the options name different calibration {name.replace('_', ' ')}",
                    expected=str(getattr(wanted, name)),
                    got=str(getattr(given, name)),
                    remedy="leave the option out, or change the plan",
                )
        if given.data is not None:
            return replace(wanted, data=given.data).hashed()
    if wanted.data is None:
        return wanted
    neighbour = Path(str(plan)).parent / str(wanted.data) if not isinstance(plan, Plan) else None
    if neighbour is not None and neighbour.is_file():
        return replace(wanted, data=neighbour).hashed()
    if wanted.sha256 is not None and not as_named(wanted.data).is_file():
        raise RegroupError(
            "the calibration text of the plan is not here",
            file=wanted.data,
            expected=f"a file with sha256 {wanted.sha256}",
            remedy="pass it by --calibration FILE, with the plan",
        )
    return wanted.hashed()


def _holds_ids(path: Path) -> bool:
    """Whether a file begins as the text that a conversion keeps."""
    try:
        if not path.is_file():
            return False  # a pipe can be read only once
        with path.open("rb") as file:
            return file.readline(1 << 20).startswith(b'{"input_ids": [')
    except OSError:
        return False


def _needless(processes: ProcessGroup) -> RegroupError:
    return RegroupError(
        "several processes were started, and there is no calibration text for them to share",
        expected="--calibration, or one process",
        got=f"{processes.size} processes",
        remedy="run the command without a launcher",
    )
