"""The plan: what is asked of a checkpoint, as frozen data and as readable, editable JSON.

A plan reproduces its result: it names the methods, the calibration text with its hash, the repair and the seed. What a
conversion finds on the way (groupings, methods chosen on text, losses) is a plan of its own, all of it spelled out, in
the result (``plans.result``).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import NoneType
from typing import Any

from ..errors import RegroupError
from ..files import parse_json, read_once
from ..layout.types import Layout
from ..merge.registry import METHODS
from .calibration import CalibrationText
from .check import check_layers
from .layer import LayerPlan

FORMAT = "regroup-plan/1"
# What may be asked for: a method, or "auto" for the one that does best for each layer.
ASKED_METHODS = ("auto", *METHODS)
REPAIRS = ("none", "output", "distill")
DEFAULT_REPAIR = "distill"


@dataclass(frozen=True)
class Plan:
    """What is asked of a checkpoint.

    Attributes:
        family: the layout's family.
        fingerprint: the layout's fingerprint; the plan fits no other.
        layers: one entry for each attention layer of the layout, in its order.
        tensor_parallel: the degree that every layer's KV heads were checked against.
        seed: of the method ``random``, and of the search for groups.
        kv_budget: the KV cache that was asked for, as the user wrote it; None where numbers of KV heads were given.
        predicted_kl: the sum of the layers' predictions, in nats per token; None where they were not measured.
        grouping: ``"search"`` if layers without a ``query_order`` are to have their heads grouped by a search; None
            leaves neighbouring heads together.
        calibration: the text to calibrate on; None uses the weights alone.
        repair: what calibration does after merging (see ``calibration.Settings``); None without calibration.
    """

    family: str
    fingerprint: str
    layers: tuple[LayerPlan, ...]
    tensor_parallel: int = 1
    seed: int = 0
    kv_budget: str | None = None
    predicted_kl: float | None = None
    grouping: str | None = None
    calibration: CalibrationText | None = None
    repair: str | None = None

    @property
    def uniform(self) -> int | None:
        """The number of KV heads that all layers share, or None."""
        counts = {layer.num_key_value_heads for layer in self.layers}
        return counts.pop() if len(counts) == 1 else None

    def digest(self) -> str:
        """Hash of the plan, recorded in what is made by it."""
        return hashlib.sha256(self.dumps().replace(_ORIGINAL, _ORIGINAL_BEFORE).encode()).hexdigest()[:16]

    def dumps(self) -> str:
        """The plan as JSON, one line per layer."""
        head = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}}
        if self.calibration is not None:
            head["calibration"] = self.calibration.to_json()
        lines = ",\n    ".join(json.dumps(_said(asdict(layer))) for layer in self.layers)
        return json.dumps(_said(head), indent=2)[:-2] + f',\n  "layers": [\n    {lines}\n  ]\n}}\n'

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan, perhaps edited by hand.

        Raises:
            RegroupError: unreadable, of another format, or with unknown or missing fields.
        """
        try:
            data = parse_json(read_once(path))
        except OSError as error:
            raise RegroupError("the plan cannot be read", file=path, got=error.strerror or str(error)) from error
        except (ValueError, RecursionError) as error:
            raise RegroupError("the plan cannot be read", file=path, got=str(error)[:200]) from error
        return cls.from_json(data, path)

    @classmethod
    def from_json(cls, data: Any, path: Path) -> Plan:
        """A plan from parsed JSON; ``path`` is where it was read, for messages.

        Raises:
            RegroupError: as ``load``.
        """
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise RegroupError(
                "this is not a plan that this version understands",
                file=path,
                expected=f'"format": "{FORMAT}"',
                remedy="make one with `regroup plan`",
            )
        values = {name: value for name, value in data.items() if name != "format"}
        layers = values.get("layers")
        if not isinstance(layers, list) or not layers:
            raise RegroupError("the plan has no layers", file=path, expected='"layers": [{…}, …]')
        values["layers"] = tuple(_build(LayerPlan, _renamed(layer), path) for layer in layers)
        if values.get("calibration") is not None:
            values["calibration"] = _build(CalibrationText, values["calibration"], path)
        return _build(cls, values, path)

    def check(self, layout: Layout) -> None:
        """Check the plan against the layout that it is to be used on.

        Raises:
            RegroupError: naming the layer and the remedy.
        """
        self._check_request()
        if self.fingerprint != layout.fingerprint():
            raise RegroupError(
                "the plan was made for another checkpoint",
                expected=f"{self.family}, {len(self.layers)} attention layers, fingerprint {self.fingerprint}",
                got=f"{layout.family}, {len(layout.layers)} attention layers, fingerprint {layout.fingerprint()}",
                remedy="make a plan for this checkpoint with `regroup plan`",
            )
        check_layers(self.layers, layout.layers, self.tensor_parallel, calibrated=self.calibration is not None)

    def _check_request(self) -> None:
        choices = (("grouping", self.grouping, (None, "search")), ("repair", self.repair, (None, *REPAIRS)))
        for name, value, allowed in choices:
            if value not in allowed:
                raise RegroupError(
                    f"the {name} of the plan is not known",
                    expected=" or ".join("null" if choice is None else repr(choice) for choice in allowed),
                    got=repr(value),
                )
        text = self.calibration
        sizes = (
            ()
            if text is None
            else (("tokens", text.tokens, 1), ("window", text.window, 2), ("batch", text.batch_size(pairs=False), 1))
        )
        for name, size, least in sizes:
            if not least <= size < 2**63:
                raise RegroupError(
                    "a size of the calibration text is out of range",
                    expected=f"{name} of at least {least}, as an int64",
                    got=size,
                )
        if (self.repair is None) != (self.calibration is None):
            raise RegroupError(
                "calibration and repair of the plan do not go together",
                expected="both or neither",
                got=f"calibration: {self.calibration and self.calibration.name}, repair: {self.repair}",
                remedy=f"give both; the usual repair is {DEFAULT_REPAIR!r}",
            )


# A field and its name in older releases, by which plans are still hashed.
_ORIGINAL, _ORIGINAL_BEFORE = "original_num_key_value_heads", "parent_num_key_value_heads"
# Fields that are left out of the JSON while they have no value: they were added later, and a plan without them keeps
# its hash.
_LATER = ("kv_budget", "predicted_kl", "grouping", "calibration", "repair")


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in _LATER or value is not None}


# Types that a hand-edited field must have, by annotation.
_TYPES: dict[str, tuple[type, ...]] = {
    "bool": (),
    "str": (str,),
    "int": (int,),
    "str | None": (str, NoneType),
    "str | Path | None": (str, NoneType),
    # A place, which no plan names.
    "Path | None": (NoneType,),
    "float | None": (float, int, NoneType),
}


def _build(cls: type, data: object, path: Path) -> Any:
    """Make a dataclass from parsed JSON, or say which field is wrong."""
    known = {f.name: f for f in fields(cls)}
    if not isinstance(data, Mapping) or set(data) - set(known):
        extra = sorted(set(data) - set(known)) if isinstance(data, Mapping) else data
        raise RegroupError(
            "the plan has fields that this version does not know", file=path, expected=", ".join(known), got=extra
        )
    values = dict(data)
    for name, spec in known.items():
        if name not in values:
            continue
        value, wanted = values[name], _TYPES.get(str(spec.type))
        if spec.type == "bool" and isinstance(value, bool):
            continue
        if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise RegroupError(
                "a field of the plan has the wrong type", file=path, expected=f"{name}: {spec.type}", got=repr(value)
            )
        if name == "predicted_kl" and value is not None:
            values[name] = _nats(name, value, path)
        if name == "query_order" and value is not None:
            if not isinstance(value, list) or not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
                raise RegroupError("query_order is not a list of head numbers", file=path, got=repr(value)[:120])
            values[name] = tuple(value)
    try:
        return cls(**values)
    except TypeError as error:
        raise RegroupError(
            "the plan lacks a field", file=path, expected=", ".join(known), got=", ".join(values)
        ) from error


def _renamed(layer: Any) -> Any:
    """The layer of a plan with the field names of today: older releases called the original model the parent."""
    if not isinstance(layer, Mapping):
        return layer
    return {_ORIGINAL if name == _ORIGINAL_BEFORE else name: value for name, value in layer.items()}


def _nats(name: str, value: float, path: Path) -> float:
    """A divergence of the JSON, which may also say NaN, Infinity, an integer that no float holds, or less than 0."""
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    finite = math.isfinite(number)
    if not finite or number < 0:
        raise RegroupError(
            "a field of the plan is negative" if finite else "a field of the plan is not a finite number",
            file=path,
            expected=f"{name}: nats per token, 0 or more",
            got=str(number),
            remedy="correct it or leave it out",
        )
    return number
