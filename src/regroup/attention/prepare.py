"""``prepare_for_inference``: a model's linear layers are replaced by fast ones (``linear_layers.py``), in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..errors import RegroupError
from .cpu.linear_layers import DirectLinear, PackedLinear, fast_layer


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Make the linear layers of a model fast for decoding on CPUs, in place.

    Every ``nn.Linear`` and GPT-2 ``Conv1D`` is replaced by what is fastest here (:func:`fast_layer`): a
    :class:`DirectLinear`, which keeps its weight as it is, or a :class:`PackedLinear`, whose old weight is freed as
    soon as nobody shares it (a head tied to the embedding keeps both) and which can no longer be saved, copied, moved
    or converted. The model is left in evaluation mode and takes no gradients. Results differ from before by rounding
    alone. Call it after loading, moving and converting the model; a second call takes what has come since.

    Layers with hooks or a ``forward`` of their own stay as they are, as do those whose weights are no plain tensors
    (quantised, spread over devices) or are read past them (``nn.TransformerEncoderLayer``).

    Args:
        model: on the CPU, float32 or bfloat16; any mixture of them. A module that contains linear layers, not one.

    Returns:
        The same model.

    Raises:
        RegroupError: the model is not on the CPU, has no linear layer of these dtypes, or neither kind of layer
            can be had here. The model is as it was.
    """
    past = {
        id(child)
        for each in model.modules()
        if isinstance(each, nn.TransformerEncoderLayer)
        for child in each.children()
    }
    # named_children would pass over the second place of a module that has two.
    found = {
        f"{path}.{name}" if path else name: child
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if child is not None and id(child) not in past and _weight(child) is not None
    }
    weights = {name: _weight(module) for name, module in found.items()}
    elsewhere = {name: weight.device for name, weight in weights.items() if weight is not None and _off_cpu(weight)}
    if elsewhere:
        name, device = next(iter(elsewhere.items()))
        raise RegroupError(
            "linear layers are prepared for CPUs alone",
            tensor=f"{name}.weight",
            expected="cpu",
            got=device,
            remedy="leave prepare_for_inference out on other devices",
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
            "no linear layer can be made faster",
            expected="linear layers of float32 or bfloat16, and a C++ compiler or PyTorch with oneDNN",
            got="; ".join(why for _, why in layers.values()) or "no plain linear layer",
            remedy="use the model as it is",
        )
    del weights
    model.eval().requires_grad_(False)
    made: dict[int, nn.Module] = {}
    for name, layer in wanted.items():
        module: Any = found.pop(name)
        # A module that is in two places stays one.
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
    """The weight (out, in) of a module that is a plain linear layer, and does nothing beside."""
    if not (type(module) is nn.Linear or type(module).__name__ == "FalconLinear" or _is_conv1d(module)):
        return None
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    # A subclass may be quantised or spread over devices; without numbers there is nothing to read.
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


def _off_cpu(weight: Tensor) -> bool:
    return weight.device.type != "cpu"
