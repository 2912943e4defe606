"""What a plan may ask of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from ..errors import RegroupError
from ..layout.types import AttentionLayer
from ..merge.registry import METHODS
from .layer import LayerPlan


def check_layers(
    wanted: Sequence[LayerPlan], layers: Sequence[AttentionLayer], tensor_parallel: int, *, calibrated: bool
) -> None:
    """Check the layers' names, every layer's heads, methods and order, and the orders against each other.

    Args:
        wanted, layers: of the plan and of the layout.
        tensor_parallel: the number of devices that will share each layer.
        calibrated: whether there is calibration text, on which methods may be chosen.

    Raises:
        RegroupError: naming the layer and the remedy.
    """
    _check_names(wanted, layers)
    orders: dict[str, tuple[int, ...]] = {}
    for want, layer in zip(wanted, layers, strict=True):
        _check_heads(want, layer, tensor_parallel)
        _check_methods(want, layer, calibrated)
        _check_order(want, layer, orders)


def allowed_kv_heads(layer: AttentionLayer, tensor_parallel: int = 1) -> list[int]:
    """Every number of KV heads that a plan may give a layer, ascending.

    A divisor of the query heads, not above the original number, and a multiple or a divisor of ``tensor_parallel``:
    below the degree, engines copy a KV head to several devices, which works while it is a divisor of the degree.

    Raises:
        RegroupError: the query heads cannot be divided over that many devices, so that no number would do.
    """
    H, G = layer.num_attention_heads, layer.num_key_value_heads
    if tensor_parallel < 1 or H % tensor_parallel:
        raise RegroupError(
            "the query heads cannot be divided over that many devices",
            layer=layer.name,
            expected=f"a divisor of {H}",
            got=f"--tensor-parallel {tensor_parallel}",
            remedy=f"choose one of {', '.join(str(d) for d in range(1, H + 1) if H % d == 0)}",
        )
    return [g for g in range(1, G + 1) if H % g == 0 and (g % tensor_parallel == 0 or tensor_parallel % g == 0)]


def _check_names(wanted: Sequence[LayerPlan], layers: Sequence[AttentionLayer]) -> None:
    # The plan's fingerprint is of the checkpoint, and says nothing of entries moved or renamed by hand.
    names = zip_longest((want.name for want in wanted), (layer.name for layer in layers))
    for got, expected in names:
        if got != expected:
            raise RegroupError(
                "the plan's layers are not the checkpoint's, or in another order",
                layer=expected or got,
                expected=expected or "no more layers",
                got="no more layers" if got is None else got,
                remedy="keep the layers' names and their order",
            )


def _check_heads(want: LayerPlan, layer: AttentionLayer, tensor_parallel: int) -> None:
    H, G, wanted = layer.num_attention_heads, layer.num_key_value_heads, want.num_key_value_heads
    if (want.num_attention_heads, want.original_num_key_value_heads) != (H, G):
        raise RegroupError(
            "the plan describes a layer otherwise than it is",
            layer=layer.name,
            expected=f"{H} query heads, {G} KV heads",
            got=f"{want.num_attention_heads} query heads, {want.original_num_key_value_heads} KV heads",
            remedy="only num_key_value_heads, the methods and query_order are yours to change",
        )
    divisors = allowed_kv_heads(layer)
    if wanted > G:
        raise RegroupError(
            "more KV heads are wanted than the original model has",
            layer=layer.name,
            expected=f"at most {G}",
            got=wanted,
            remedy=f"choose one of {', '.join(map(str, divisors))}",
        )
    if wanted not in divisors:
        raise RegroupError(
            "the query heads cannot be divided into that many groups",
            layer=layer.name,
            expected=f"a divisor of {H} query heads",
            got=wanted,
            remedy=f"choose one of {', '.join(map(str, divisors))}",
        )
    usable = allowed_kv_heads(layer, tensor_parallel)
    if wanted not in usable:
        raise RegroupError(
            "the KV heads cannot be divided over the tensor-parallel devices",
            layer=layer.name,
            expected=f"a multiple or a divisor of {tensor_parallel}",
            got=wanted,
            remedy=f"choose one of {', '.join(map(str, usable))}",
        )


def _check_methods(want: LayerPlan, layer: AttentionLayer, calibrated: bool) -> None:
    both = (want.key_method, want.value_method)
    for name in both:
        if name not in METHODS and not (name == "auto" and calibrated):
            raise RegroupError(
                "the merge method is not known" if name != "auto" else "there is no text to choose the method on",
                layer=want.name,
                expected=" or ".join(METHODS),
                got=repr(name),
                remedy="mean is the paper's" if name != "auto" else "pass --calibration, or name a method",
            )
    if not want.changes:
        return
    methods = [METHODS[name] for name in both if name != "auto"]
    pooled = [method.name for method in methods if method.share is None]
    if calibrated and pooled:
        raise RegroupError(
            "calibration text was given, and a method that does not look at it",
            layer=want.name,
            expected=" or ".join(["auto", *(name for name, method in METHODS.items() if method.share is not None)]),
            got=" and ".join(sorted(set(pooled))),
            remedy="leave out --calibration, or choose another method",
        )
    if pooled and any(method.linear_only for method in methods):
        raise RegroupError(
            "these methods for keys and values cannot be combined",
            layer=want.name,
            expected=f"two of {', '.join(name for name, method in METHODS.items() if method.share is not None)}",
            got=" and ".join(both),
            remedy="use the same method for both",
        )
    rotated = None
    if layer.rotary is not None and want.key_method != "auto" and METHODS[want.key_method].share_rotary is None:
        rotated = f"{want.key_method} has no form for keys that RoPE rotates"
    obstacles = (
        ("keys", want.key_method, layer.key_obstacle or rotated),
        ("values", want.value_method, layer.value_obstacle),
    )
    for what, name, obstacle in obstacles:
        if name != "auto" and METHODS[name].linear_only and obstacle is not None:
            raise RegroupError(
                f"the {what} of this layer cannot be shared by a linear map: {obstacle}",
                layer=layer.name,
                expected=" or ".join(name for name, method in METHODS.items() if not method.linear_only),
                got=name,
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
