"""``prepare_for_inference``: replace a model's linear layers by fast ones (``cpu/linear_layers.py``), in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegroupError
from .cpu.linear_layers import DirectLinear, PackedLinear, fast_layer


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model by ones that are fast for decoding on CPUs, in place.

    Every ``nn.Linear`` and GPT-2 ``Conv1D`` is replaced by the fastest layer for this machine (:func:`fast_layer`): a
    :class:`DirectLinear`, which keeps its weight, or a :class:`PackedLinear`, which frees its old weight unless it is
    shared (a head that is tied to the embedding keeps both) and can no longer be saved, copied, moved or converted.
    The model is left in evaluation mode without gradients. Results differ by rounding only. Call it after loading,
    moving and converting the model; a second call replaces layers that were added since.

    Layers with hooks or their own ``forward`` are not replaced, nor are layers whose weights are not plain tensors
    (quantised, distributed) or are read by another module (``nn.TransformerEncoderLayer``).

    Args:
        model: on the CPU, in float32 or bfloat16 or both. It must contain linear layers, not be one.

    Returns:
        The same model.

    Raises:
        RegroupError: the model is not on the CPU, has no linear layer of these dtypes, or neither kind of layer is
            available here. The model is unchanged.
    """
    read_by_parent = {
        id(child)
        for each in model.modules()
        if isinstance(each, nn.TransformerEncoderLayer)
        for child in each.children()
    }
    # named_children would skip the second place of a module that is in two places.
    found = {
        f"{path}.{name}" if path else name: child
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) not in read_by_parent and _weight(child) is not None
    }
    weights = {name: _weight(module) for name, module in found.items()}
    elsewhere = {name: weight.device for name, weight in weights.items() if weight is not None and not weight.is_cpu}
    if elsewhere:
        name, device = next(iter(elsewhere.items()))
        raise RegroupError(
            "linear layers can be prepared only for CPUs",
            tensor=f"{name}.weight",
            expected="cpu",
            got=device,
            remedy="do not call prepare_for_inference on other devices",
        )
    dtypes = {weight.dtype for weight in weights.values() if weight is not None}
    layers = {dtype: fast_layer(dtype) for dtype in dtypes}
    wanted = {
        name: layer for name, weight in weights.items() if weight is not None and (layer := layers[weight.dtype][0])
    }
    if not found and any(isinstance(module, DirectLinear | PackedLinear) for module in model.modules()):
        return model
    if not wanted:
        raise RegroupError(
            "no linear layer can be replaced by a faster one",
            expected="linear layers of float32 or bfloat16, and a C++ compiler or PyTorch with oneDNN",
            got="; ".join(why for _, why in layers.values()) or "no plain linear layer",
            remedy="use the model without prepare_for_inference",
        )
    del weights
    model.eval().requires_grad_(False)
    made: dict[int, nn.Module] = {}
    for name, layer in wanted.items():
        module: Any = found.pop(name)
        # A module that is in two places stays one module.
        weight = _weight(module)
        assert weight is not None
        fast = made.get(id(module)) or layer(weight, module.bias)
        if isinstance(fast, DirectLinear):
            fast.stored_transposed = _is_conv1d(module)
        made[id(module)] = fast
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, fast)
        del module, weight
    return model


def _weight(module: Any) -> Tensor | None:
    """The weight (out, in) of a plain linear layer, or None for any other module."""
    if not (type(module) is nn.Linear or type(module).__name__ == "FalconLinear" or _is_conv1d(module)):
        return None
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    # A subclass may be quantised or distributed.
    if (
        type(module.weight) is not nn.Parameter
        or module.weight.layout is not torch.strided
        or not module.weight.numel()
    ):
        return None
    return module.weight.t() if _is_conv1d(module) else module.weight


def _is_conv1d(module: Any) -> bool:
    """Whether it is GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
