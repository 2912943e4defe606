"""A plan from numbers of KV heads: one for all layers, or some for ranges of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from ..errors import RegroupError
from ..layout.types import AttentionLayer, Layout
from ..merge.registry import METHODS
from .calibration import CalibrationText
from .layer import LayerPlan
from .plan import DEFAULT_REPAIR, Plan


def make_plan(
    layout: Layout,
    kv_heads: int | None = None,
    *,
    layers: str | Mapping[str, int] | None = None,
    method: str = "mean",
    tensor_parallel: int = 1,
    seed: int = 0,
    grouping: str | None = None,
    calibration: CalibrationText | None = None,
    repair: str | None = None,
) -> Plan:
    """Plan a conversion.

    Args:
        layout: of the original model.
        kv_heads: KV heads of every layer that ``layers`` does not name; None leaves those as they are.
        layers: for example ``"0-3:8,4-31:4"``; ``"self.0-5:4,cross.0-5:2"`` names one kind of an encoder-decoder. Or KV
            heads by the layer's name.
        method: for keys and values: ``"mean"`` (the paper's, section 2.1), ``"first"``, ``"random"``, ``"lowrank"``,
            ``"procrustes"``, or ``"auto"``: what does best for each layer, by held-out error where there is text.
        tensor_parallel: number of devices that will share each layer; KV heads must divide evenly over them.
        seed: of the method ``random``, and of the search for groups.
        grouping: ``"search"`` to look for heads that belong together; None keeps neighbouring heads together.
        calibration: text to calibrate on.
        repair: what calibration does after merging: ``"none"``, ``"output"`` or ``"distill"`` (the default).

    Returns:
        A checked plan.

    Raises:
        RegroupError: a constraint is broken; the message names the remedy.
    """
    if kv_heads is None and layers is None:
        raise RegroupError("no number of KV heads was given", remedy="pass --kv-heads G, --layers, or a plan")
    if method != "auto" and method not in METHODS:
        raise RegroupError(
            "the merge method is not known",
            expected=" or ".join(("auto", *METHODS)),
            got=repr(method),
            remedy="mean is the paper's",
        )
    chosen = parse_layers(layers, layout) if isinstance(layers, str) else dict(layers or {})
    strangers = sorted(chosen.keys() - {layer.name for layer in layout.layers})
    if strangers:
        raise RegroupError(
            "a number of KV heads is for a layer that does not exist",
            layer=str(strangers[0]),
            expected=f"attention layers such as {layout.layers[0].name}",
        )
    on_text = method == "auto" and calibration is not None
    plan = Plan(
        family=layout.family,
        fingerprint=layout.fingerprint(),
        layers=tuple(
            LayerPlan(
                name=layer.name,
                num_attention_heads=layer.num_attention_heads,
                original_num_key_value_heads=layer.num_key_value_heads,
                num_key_value_heads=chosen.get(layer.name, layer.num_key_value_heads if kv_heads is None else kv_heads),
                key_method=method if on_text else _key_method(method, layer),
                value_method=method if on_text else _value_method(method, layer),
            )
            for layer in layout.layers
        ),
        tensor_parallel=tensor_parallel,
        seed=seed,
        grouping=grouping,
        calibration=calibration,
        repair=(repair or DEFAULT_REPAIR) if calibration is not None else None,
    )
    plan.check(layout)
    return plan


def spelled_out(plan: Plan, layout: Layout) -> Plan:
    """The plan without calibration: what is still open in it, as in layers that keep their heads, as weights decide."""
    layers = (
        replace(
            want, key_method=_key_method(want.key_method, layer), value_method=_value_method(want.value_method, layer)
        )
        for want, layer in zip(plan.layers, layout.layers, strict=True)
    )
    return replace(plan, layers=tuple(layers), grouping=None, calibration=None, repair=None)


def _key_method(method: str, layer: AttentionLayer) -> str:
    if method != "auto":
        return method
    return "lowrank" if layer.key_obstacle is None else "mean"


def _value_method(method: str, layer: AttentionLayer) -> str:
    if method != "auto":
        return method
    if layer.value_obstacle is not None:
        return "mean"
    # Measured without text, on models with rotary positions and on one without (docs/methods.md, ablations).
    return "lowrank" if layer.rotary is None else "procrustes"


_RANGE = re.compile(r"(?:(self|cross|encoder)\.)?(\d+)(?:-(\d+))?:(\d+)")


def parse_layers(text: str, layout: Layout) -> dict[str, int]:
    """Layer names to KV heads, from text such as ``"0-3:8,4-31:4"``.

    Raises:
        RegroupError: unreadable, a layer that does not exist or is named twice, or an encoder.
    """
    found: dict[str, int] = {}
    by_place = {(layer.kind, layer.index): layer.name for layer in layout.layers}
    last = max(layer.index for layer in layout.layers)
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise RegroupError(
                "the layers cannot be read",
                expected="ranges such as 0-3:8,4-31:4 (layers:KV heads), each perhaps with self. or cross. before it",
                got=part,
            )
        kind, first, end = match[1], int(match[2]), int(match[3] or match[2])
        if kind == "encoder":
            raise RegroupError(
                "encoder layers are not converted",
                got=part,
                expected="decoder layers: self.… or cross.…",
                remedy="leave them out; an encoder runs in parallel and reads no cache (paper, section 2.2)",
            )
        if end < first or end > last:
            raise RegroupError("a range names layers that do not exist", expected=f"layers 0 to {last}", got=part)
        kinds = [kind] if kind else ["self", "cross"]
        names = [by_place[k, i] for i in range(first, end + 1) for k in kinds if (k, i) in by_place]
        if not names:
            raise RegroupError("a range names layers that do not exist", expected="a decoder with them", got=part)
        for name in names:
            if name in found:
                raise RegroupError("a layer is named twice", layer=name, got=text)
            found[name] = int(match[4])
    return found
