"""Put converted attention into a decoder layer, as it will be stored and loaded."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..layout.types import AttentionLayer
from ..modeling.modeling_regroup import regroup_attention
from ..plans import LayerPlan
from ..solver.heads import load_into, projection_tensors
from ..solver.rewrite import rewrites
from .decoder_layer import DecoderLayer


def install(
    student: DecoderLayer,
    layer: AttentionLayer,
    want: LayerPlan,
    tensors: Mapping[str, torch.Tensor],
    checkpoint: Checkpoint,
    *,
    stock: nn.Module | None = None,
) -> None:
    """Replace an attention module by grouped attention with these weights, rounded as they will be stored.

    Args:
        student: the decoder layer, changed in place.
        layer: the original attention layer.
        want: how its heads are grouped.
        tensors: weights and biases of the four projections.
        checkpoint: the original, from which parameters that are pooled (such as norms per head) are read.
        stock: the original module; by default the one that the decoder layer has now.
    """
    module = copy.deepcopy(student.attention(layer) if stock is None else stock)
    regroup_attention(module, want.num_key_value_heads, layer.name)
    infos = checkpoint.tensors
    pooled, _ = rewrites(layer, want, infos, std=0.0, seed=0)
    extras = {name: how.run(name, checkpoint.read) for name, how in pooled.items() if name not in tensors}
    rounded = {
        name: value.to(TORCH_DTYPES[infos[name].dtype]).float() for name, value in (extras | dict(tensors)).items()
    }
    load_into(module, layer, rounded)
    parent_path, _, name = student.caller.path_of(layer).rpartition(".")
    setattr(student.module.get_submodule(parent_path), name, module)


def stored_tensors(student: DecoderLayer, layer: AttentionLayer, checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """The projections of a converted attention layer in the dtypes that are stored; the layer gets the same values."""
    attention, tensors = student.attention(layer), {}
    for name in projection_tensors(layer):
        value = attention.get_parameter(name.removeprefix(layer.name + ".")).detach().cpu()
        tensors[name] = value.to(TORCH_DTYPES[checkpoint.tensors[name].dtype]).contiguous()
    load_into(attention, layer, {name: value.float() for name, value in tensors.items()})
    return tensors
