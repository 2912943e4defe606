"""Which export formats hold a checkpoint's KV heads, and how heads are repeated for the others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..errors import RegroupError
from ..families import FAMILIES, family_for
from ..families.reading import slow_output
from ..layout import Layout
from ..layout.nemotron_nas import to_blocks
from ..layout.types import TensorInfo
from ..opening import Source
from ..plans import LayerPlan, Plan
from ..solver.rewrite import Change, Move, rewrite_of
from ..writer.converted_config import converted_config, is_stock
from .request import Request

# Families whose layers are Llama's, so that Llama's code in another program runs them.
LLAMA_LAYERS = tuple(sorted({family.stock_type for family in FAMILIES.values() if family.gguf == "llama"}))


# What a stock class supports, by ``Layout.native_kv_heads``.
_HELD = {
    "any": "the same number in every layer",
    "mqa": "1 in every layer, or as many as query heads",
    "none": "as many as query heads: this family knows no grouped heads",
}


def heads_of(layout: Layout) -> tuple[int, ...]:
    """KV heads of every attention layer, in the order of the layout."""
    return tuple(layer.num_key_value_heads for layer in layout.layers)


def plan_of(layout: Layout, heads: Sequence[int], *, tensor_parallel: int = 1) -> Plan:
    """A plan that leaves each layer, or has been carried out on it, with these KV heads."""
    layers = (
        LayerPlan(layer.name, layer.num_attention_heads, layer.num_key_value_heads, wanted)
        for layer, wanted in zip(layout.layers, heads, strict=True)
    )
    return Plan(layout.family, layout.fingerprint(), tuple(layers), tensor_parallel=tensor_parallel)


def check_served(config: Mapping[str, Any], layout: Layout) -> None:
    """Refuse what vLLM would run as another model than transformers does.

    Raises:
        RegroupError: with the switch; or the model's head is not its embedding, which vLLM takes for it in this family.
    """
    if FAMILIES[layout.family].vllm == "embedding" and not layout.tied_embeddings:
        raise RegroupError(
            "vLLM would compute other logits than transformers: it leaves out this family's stored head",
            file="config.json",
            expected="the embedding as output head",
            got=f"a {layout.family} with a head of its own",
            remedy="export it with --to hf",
        )
    if slow_output(config, family_for(config)):
        raise RegroupError(
            "vLLM would compute other logits than transformers: it adds output biases that this switch leaves out",
            file="config.json",
            got=f"slow_but_exact with pretraining_tp {config['pretraining_tp']}",
            remedy="export it with --to hf; or set slow_but_exact to false, which is another model: with the biases",
        )


def holds(layout: Layout, heads: Sequence[int]) -> bool:
    """Whether the family's stock transformers class supports these KV heads."""
    return is_stock(layout, plan_of(layout, heads))


def config_with(config: Mapping[str, Any], layout: Layout, heads: Sequence[int]) -> dict[str, Any]:
    """The config that transformers, or regroup on top of it, loads these KV heads by."""
    return converted_config(dict(config), layout, plan_of(layout, heads))


def source_config(opened: Source) -> dict[str, Any]:
    """The config by which the source loads as it is, whatever layout its own config is in."""
    return config_with(opened.checkpoint.config, opened.layout, heads_of(opened.layout))


def wanted_heads(opened: Source, request: Request) -> tuple[int, ...]:
    """The KV heads of each layer afterwards.

    Raises:
        RegroupError: the target does not support these heads, or they cannot be divided over the devices.
    """
    layout, devices = opened.layout, request.tensor_parallel
    heads = heads_of(layout)
    if devices is not None:
        plan_of(layout, heads, tensor_parallel=devices).check(layout)
    stock = holds(layout, heads)
    if request.expand and not stock:
        heads = (stock_heads(layout),) * len(heads)
        request.notes.append(
            f"KV heads were repeated ({spell(layout)}, now {heads[0]} in every layer): the cache grows with them"
        )
    elif request.to == "hf" and not stock and opened.checkpoint.config.get("model_type") == layout.family:
        engines = "export it with --to vllm or --to gguf, " if layout.family in LLAMA_LAYERS else ""
        raise RegroupError(
            "no stock class of transformers supports these KV heads",
            file=opened.folder,
            expected=_HELD[layout.native_kv_heads],
            got=spell(layout),
            remedy=f"load it as it is with trust_remote_code=True, {engines}or repeat KV heads until a stock class "
            "supports them: --expand",
        )
    if devices is not None and min(heads) < devices:
        few = f"{min(heads)} KV heads for {devices} devices"
        if request.to == "vllm":
            request.notes.append(f"{few}: vLLM gives each device a copy; the cache does not shrink with more devices")
        elif layout.native_kv_heads == "any" and len(set(heads)) == 1:
            request.notes.append(f"{few}: each KV head was repeated {devices // heads[0]} times, one for each device")
            heads = (devices,) * len(heads)
        else:
            raise RegroupError(
                "the KV heads cannot be divided over the tensor-parallel devices",
                expected=f"at least {devices} in every layer",
                got=spell(layout),
                remedy="add --expand",
            )
    return heads


def stock_heads(layout: Layout) -> int:
    """The least number of KV heads that a stock class holds and every layer's heads can be repeated to."""
    heads = set(heads_of(layout))
    most = max(layer.num_attention_heads for layer in layout.layers)
    if layout.native_kv_heads == "any":
        return math.lcm(*heads)
    return 1 if layout.native_kv_heads == "mqa" and heads == {1} else most


def repeated(layout: Layout, heads: int, tensors: Mapping[str, TensorInfo]) -> dict[str, Change]:
    """How to make every tensor that changes when each KV head is repeated ``heads / G`` times.

    Every query head reads the same keys and values as before, so the logits are the same; the cache is larger.

    Args:
        layout, tensors: of the checkpoint.
        heads: KV heads of every layer afterwards; a multiple of each layer's G.

    Raises:
        RegroupError: a layer has a parameter for each KV head that lies in a tensor of its own.
    """
    changed: dict[str, Change] = {}
    for layer in layout.layers:
        before = layer.num_key_value_heads
        if before == heads:
            continue
        expanded = layer.with_kv_heads(heads)
        sources = tuple((head * before // heads,) for head in range(heads))
        own = tuple((head,) for head in range(layer.num_attention_heads))
        parts = [(layer.key, expanded.key, sources), (layer.value, expanded.value, sources)]
        if layer.packing != "separate":
            parts.append((replace(layer.query, extras=()), replace(expanded.query, extras=()), own))
        moves: dict[str, list[Move]] = {}
        slots = [(*pair, where) for old, new, where in parts for pair in zip(old.slots(), new.slots(), strict=True)]
        for old, new, where in slots:
            if "{head}" in old.tensor:
                raise RegroupError(
                    "the KV heads of this layer cannot be repeated: each has a tensor of its own",
                    layer=layer.name,
                    got=old.tensor.format(head=0),
                    remedy="convert the original model to the same number of KV heads in every layer instead",
                )
            moves.setdefault(new.tensor, []).append(Move(old, new, where, _never))
        changed |= {name: rewrite_of(name, made_of, tensors) for name, made_of in moves.items()}
    return changed


def _never(heads: torch.Tensor, head: int) -> torch.Tensor:
    raise AssertionError("a repeated head has one source")


def block_config(config: Mapping[str, Any], layout: Layout) -> dict[str, Any]:
    """The config of a Llama-like checkpoint in the Nemotron-NAS layout.

    Raises:
        RegroupError: its layers are not Llama's.
    """
    heads = heads_of(layout)
    plain = config_with(config, layout, heads)
    windowed = [layer.name for layer in layout.layers if layer.window is not None]
    if layout.family not in LLAMA_LAYERS or windowed or plain.get("hidden_act", "silu") != "silu":
        raise RegroupError(
            "the layers have different numbers of KV heads, and no engine's layout for that supports this family",
            layer=windowed[0] if windowed else None,
            expected=f"{' or '.join(LLAMA_LAYERS)}, without an attention window",
            got=f"{layout.family}, {spell(layout)}",
            remedy="repeat KV heads until every layer has the same number: --expand",
        )
    return to_blocks(plain, heads)


def spell(layout: Layout) -> str:
    """The KV heads of the layers in words: ``"4 in layers 0-3, 2 in layer 4"``."""
    runs: list[tuple[int, list[int]]] = []
    for layer in layout.layers:
        if not runs or runs[-1][0] != layer.num_key_value_heads:
            runs.append((layer.num_key_value_heads, []))
        runs[-1][1].append(layer.index)
    return ", ".join(
        f"{heads} in layer {where[0]}" if len(where) == 1 else f"{heads} in layers {where[0]}-{where[-1]}"
        for heads, where in runs
    )
