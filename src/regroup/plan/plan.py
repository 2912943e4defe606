"""The plan: frozen, readable, editable JSON, made and checked before any tensor is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import RegroupError
from ..layout.types import AttentionLayer, Layout

FORMAT = "regroup-plan/1"
# Linear maps that queries and outputs absorb (``regroup.merge.sharing``); the paper's rules need no such thing.
LINEAR_METHODS = ("lowrank", "procrustes")
METHODS = ("mean", "first", "random", *LINEAR_METHODS)


@dataclass(frozen=True)
class LayerPlan:
    """What is wanted of one attention layer.

    Attributes:
        name: the attention module, as the layout names it.
        num_attention_heads: H, unchanged; here so that a person can read the plan alone.
        parent_num_key_value_heads, num_key_value_heads: KV heads before and after.
        key_method, value_method: the rule that merges the keys and values of a group.
        query_order: the parent's query heads in the child's order; None leaves them as they are.
    """

    name: str
    num_attention_heads: int
    parent_num_key_value_heads: int
    num_key_value_heads: int
    key_method: str = "mean"
    value_method: str = "mean"
    query_order: tuple[int, ...] | None = None

    @property
    def order(self) -> tuple[int, ...]:
        """The order of query heads, spelled out."""
        return tuple(range(self.num_attention_heads)) if self.query_order is None else self.query_order

    @property
    def methods(self) -> tuple[str, str]:
        """Rules for keys and values, for people to read: none where the layer is copied."""
        return (self.key_method, self.value_method) if self.changes else ("–", "–")

    @property
    def changes(self) -> bool:
        """False if the layer is copied bit for bit."""
        return self.num_key_value_heads != self.parent_num_key_value_heads or self.order != tuple(
            range(self.num_attention_heads)
        )


@dataclass(frozen=True)
class Plan:
    """What is wanted of a checkpoint.

    Attributes:
        family: the layout's family.
        fingerprint: the layout's fingerprint; the plan fits no other.
        layers: one entry for each attention layer of the layout, in its order.
        tensor_parallel: the degree that every layer's KV heads were checked against.
        seed: of the ``random`` rule.
    """

    family: str
    fingerprint: str
    layers: tuple[LayerPlan, ...]
    tensor_parallel: int = 1
    seed: int = 0

    @property
    def uniform(self) -> int | None:
        """The number of KV heads that all layers share, or None."""
        counts = {layer.num_key_value_heads for layer in self.layers}
        return counts.pop() if len(counts) == 1 else None

    def digest(self) -> str:
        """Hash of the plan, recorded in what is made from it."""
        return hashlib.sha256(self.dumps().encode()).hexdigest()[:16]

    def dumps(self) -> str:
        """The plan as JSON, a line a layer."""
        head = {"format": FORMAT, **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}}
        lines = ",\n    ".join(json.dumps(asdict(layer)) for layer in self.layers)
        return json.dumps(head, indent=2)[:-2] + f',\n  "layers": [\n    {lines}\n  ]\n}}\n'

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan, perhaps edited by hand.

        Raises:
            RegroupError: unreadable, of another format, or with unknown or missing fields.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RegroupError("the plan cannot be read", file=path, got=str(error)[:200]) from error
        if not isinstance(data, dict) or data.pop("format", None) != FORMAT:
            raise RegroupError(
                "this is not a plan that this version understands",
                file=path,
                expected=f'"format": "{FORMAT}"',
                remedy="make one with `regroup plan`",
            )
        layers = data.pop("layers", None)
        if not isinstance(layers, list) or not layers:
            raise RegroupError("the plan has no layers", file=path, expected='"layers": [{…}, …]')
        built = tuple(_build(LayerPlan, layer, path) for layer in layers)
        return _build(cls, {**data, "layers": built}, path)

    def check(self, layout: Layout) -> None:
        """Check every constraint of the plan against the layout that it is to be used on.

        Raises:
            RegroupError: naming the layer and the remedy.
        """
        if self.fingerprint != layout.fingerprint() or [p.name for p in self.layers] != [x.name for x in layout.layers]:
            raise RegroupError(
                "the plan was made for another checkpoint",
                expected=f"{self.family}, {len(self.layers)} attention layers, fingerprint {self.fingerprint}",
                got=f"{layout.family}, {len(layout.layers)} attention layers, fingerprint {layout.fingerprint()}",
                remedy="make a plan for this checkpoint with `regroup plan`",
            )
        orders: dict[str, tuple[int, ...]] = {}
        for want, layer in zip(self.layers, layout.layers, strict=True):
            _check_heads(want, layer, self.tensor_parallel)
            _check_methods(want, layer)
            _check_order(want, layer, orders)


def make_plan(
    layout: Layout,
    kv_heads: int | None = None,
    *,
    layers: str | None = None,
    method: str = "mean",
    tensor_parallel: int = 1,
    seed: int = 0,
) -> Plan:
    """Plan a conversion with contiguous groups.

    Args:
        layout: of the parent.
        kv_heads: KV heads of every layer that ``layers`` does not name; None leaves those as they are.
        layers: for example ``"0-3:8,4-31:4"``; ``"self.0-5:4,cross.0-5:2"`` names one kind of an encoder-decoder.
        method: the rule for keys and values: ``"mean"`` (the paper's, section 2.1), ``"first"``, ``"random"``,
            ``"lowrank"``, ``"procrustes"``, or ``"auto"``: what does best for each layer where no text is at hand.
        tensor_parallel: number of devices that will share each layer; KV heads must divide evenly over them.
        seed: of the ``random`` rule.

    Returns:
        A checked plan.

    Raises:
        RegroupError: a constraint is broken; the message names the remedy.
    """
    if kv_heads is None and layers is None:
        raise RegroupError("no number of KV heads was given", remedy="pass --kv-heads G, --layers, or a plan")
    chosen = parse_layers(layers, layout) if layers is not None else {}
    plan = Plan(
        family=layout.family,
        fingerprint=layout.fingerprint(),
        layers=tuple(
            LayerPlan(
                name=layer.name,
                num_attention_heads=layer.num_attention_heads,
                parent_num_key_value_heads=layer.num_key_value_heads,
                num_key_value_heads=chosen.get(layer.name, layer.num_key_value_heads if kv_heads is None else kv_heads),
                key_method=_key_method(method, layer),
                value_method=_value_method(method, layer),
            )
            for layer in layout.layers
        ),
        tensor_parallel=tensor_parallel,
        seed=seed,
    )
    plan.check(layout)
    return plan


def _key_method(method: str, layer: AttentionLayer) -> str:
    if method != "auto":
        return method
    if layer.key_obstacle is not None:
        return "mean"
    return "lowrank"


def _value_method(method: str, layer: AttentionLayer) -> str:
    if method != "auto":
        return method
    # Without text the norm that low-rank minimises misleads it for values (docs/methods.md, ablations).
    return "procrustes" if layer.value_obstacle is None else "mean"


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


def _check_heads(want: LayerPlan, layer: AttentionLayer, tensor_parallel: int) -> None:
    H, G, wanted = layer.num_attention_heads, layer.num_key_value_heads, want.num_key_value_heads
    if (want.num_attention_heads, want.parent_num_key_value_heads) != (H, G):
        raise RegroupError(
            "the plan describes a layer otherwise than it is",
            layer=layer.name,
            expected=f"{H} query heads, {G} KV heads",
            got=f"{want.num_attention_heads} query heads, {want.parent_num_key_value_heads} KV heads",
            remedy="only num_key_value_heads, the methods and query_order are yours to change",
        )
    divisors = [g for g in range(1, G + 1) if H % g == 0]
    if wanted > G:
        raise RegroupError(
            "more KV heads are wanted than the parent has",
            layer=layer.name,
            expected=f"at most {G}",
            got=wanted,
            remedy=f"choose one of {', '.join(map(str, divisors))}",
        )
    if wanted < 1 or H % wanted:
        raise RegroupError(
            "the query heads cannot be divided into that many groups",
            layer=layer.name,
            expected=f"a divisor of {H} query heads",
            got=wanted,
            remedy=f"choose one of {', '.join(map(str, divisors))}",
        )
    if tensor_parallel < 1 or H % tensor_parallel:
        raise RegroupError(
            "the query heads cannot be divided over that many devices",
            layer=layer.name,
            expected=f"a divisor of {H}",
            got=f"--tensor-parallel {tensor_parallel}",
            remedy=f"choose one of {', '.join(str(d) for d in range(1, H + 1) if H % d == 0)}",
        )
    # Below the degree, engines copy a KV head to several devices, which works while it is a divisor of the degree.
    if wanted % tensor_parallel and tensor_parallel % wanted:
        usable = [g for g in divisors if g % tensor_parallel == 0 or tensor_parallel % g == 0]
        raise RegroupError(
            "the KV heads cannot be divided over the tensor-parallel devices",
            layer=layer.name,
            expected=f"a multiple or a divisor of {tensor_parallel}",
            got=wanted,
            remedy=f"choose one of {', '.join(map(str, usable))}",
        )


def _check_methods(want: LayerPlan, layer: AttentionLayer) -> None:
    both = (want.key_method, want.value_method)
    for method in both:
        if method not in METHODS:
            raise RegroupError(
                "the merge method is not known",
                layer=want.name,
                expected=" or ".join(METHODS),
                got=repr(method),
                remedy="mean is the paper's",
            )
    if not want.changes:
        return
    if set(both) & set(LINEAR_METHODS) and set(both) & {"first", "random"}:
        raise RegroupError(
            "these methods for keys and values cannot be combined",
            layer=want.name,
            expected=f"two of mean, {', '.join(LINEAR_METHODS)}",
            got=" and ".join(both),
            remedy="use the same method for both",
        )
    obstacles = (("keys", want.key_method, layer.key_obstacle), ("values", want.value_method, layer.value_obstacle))
    for what, method, obstacle in obstacles:
        if method in LINEAR_METHODS and obstacle is not None:
            raise RegroupError(
                f"the {what} of this layer cannot be shared by a linear map: {obstacle}",
                layer=layer.name,
                expected="mean, first or random",
                got=method,
                remedy="use --method auto, which pools them by mean and solves what can be solved",
            )


def _check_order(want: LayerPlan, layer: AttentionLayer, orders: dict[str, tuple[int, ...]]) -> None:
    identity = tuple(range(layer.num_attention_heads))
    if sorted(want.order) != list(identity):
        raise RegroupError(
            "the order of query heads is not a permutation",
            layer=layer.name,
            expected=f"each of 0 to {layer.num_attention_heads - 1} once",
            got=list(want.order),
            remedy="name every head once, or leave query_order out",
        )
    if layer.fixed_order is not None and want.order != identity:
        raise RegroupError(
            "the query heads of this family may not be reordered",
            layer=layer.name,
            got=list(want.order),
            remedy=f"leave query_order out: {layer.fixed_order}",
        )
    if layer.order_group is not None and orders.setdefault(layer.order_group, want.order) != want.order:
        raise RegroupError(
            "layers that share one position bias must share one order of query heads",
            layer=layer.name,
            expected=list(orders[layer.order_group]),
            got=list(want.order),
            remedy=f"give all {layer.order_group} layers the same query_order",
        )


# Types that a hand-edited field must have, by annotation.
_TYPES = {"str": str, "int": int}


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
        if wanted is not None and (not isinstance(value, wanted) or isinstance(value, bool)):
            raise RegroupError(
                "a field of the plan has the wrong type", file=path, expected=f"{name}: {spec.type}", got=repr(value)
            )
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
