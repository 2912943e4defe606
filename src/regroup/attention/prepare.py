"""Linear layers whose weights are laid out once for the matrix product, instead of at every call.

With few rows, as in decoding, PyTorch's ``F.linear`` on CPUs reads its weights at a fraction of the memory's speed.
oneDNN reads them faster in a layout of its own. PyTorch has one public way to oneDNN, ``torch.utils.mkldnn``, which
converts the activations of every call and does not keep the fast layout (docs/decoding.md has the times); here are the
two operators that ``torch.compile`` itself has for oneDNN on CPUs. They are tried before a weight is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import RegroupError

DTYPES = (torch.float32, torch.bfloat16)


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference on CPUs, with the weight in oneDNN's layout: x (…, in) to (…, out).

    Args:
        weight: (out, in), float32 or bfloat16, on the CPU. It is copied.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # No row count: the layout suits any. Not in the state dict, which should hold weights that others can read.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.register_buffer("weight", packed, persistent=False)
        # The operator reads a bias as if it were contiguous.
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous(), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            raise RegroupError(
                "a prepared model has no gradients",
                remedy="run under torch.no_grad(), or train the model that was loaded, without preparing it",
            )
        if states.dtype != self.weight.dtype:
            raise RegroupError(
                "the states of a packed linear layer are of another dtype than its weight",
                expected=self.weight.dtype,
                got=states.dtype,
                remedy="convert the model before prepare_for_inference, and do not use torch.autocast after it",
            )
        if states.shape[-1] != self.in_features:
            raise RegroupError(
                "the states do not fit a packed linear layer",
                expected=f"(…, {self.in_features})",
                got=tuple(states.shape),
            )
        return torch.ops.mkldnn._linear_pointwise(states, self.weight, self.bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        try:
            return super()._apply(fn, recurse)
        except (NotImplementedError, RuntimeError) as error:
            raise RegroupError(
                "a prepared model cannot be moved or converted",
                layer=repr(self),
                got=str(error).split(". ")[0][:120],
                remedy="move and convert the model before prepare_for_inference",
            ) from None

    def __getstate__(self) -> Any:
        raise RegroupError(
            "a prepared model cannot be copied or pickled: its weights are in a layout of this machine",
            layer=repr(self),
            remedy="copy the model before prepare_for_inference",
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise RegroupError(
            "a prepared model cannot be saved: its weights are in a layout of this machine",
            tensor=f"{prefix}weight",
            remedy="save the model before prepare_for_inference, or keep the checkpoint that it was loaded from",
        )


def unavailable(dtype: torch.dtype) -> str | None:
    """Why weights of a dtype cannot be packed here, or None: one small product is computed and compared."""
    if dtype not in DTYPES:
        return f"{dtype} is not packed, float32 and bfloat16 are"
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    states = torch.randn(2, 3, 32, generator=generator).to(dtype)
    try:
        with torch.no_grad():
            found = PackedLinear(weight, weight[:, 0])(states)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        return f"oneDNN's operators of PyTorch {torch.__version__} do not serve: {str(error).splitlines()[0][:120]}"
    wanted = linear(states, weight, weight[:, 0])
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    if not error < (1e-5 if dtype == torch.float32 else 2e-2):
        return f"oneDNN's operators of PyTorch {torch.__version__} give other results (relative error {error:.1e})"
    return None


def prepare_for_inference(model: nn.Module) -> nn.Module:
    """Pack the linear layers of a model for fast decoding on CPUs, in place.

    Every ``nn.Linear`` and GPT-2 ``Conv1D`` becomes a :class:`PackedLinear`; its own weight is freed as soon as nobody
    shares it (a head tied to the embedding keeps both). The model is left in evaluation mode, takes no gradients, and
    can be neither trained nor saved. Results differ from before by rounding alone. Call it after loading, moving and
    converting the model; a second call packs what has come since.

    Layers with hooks or a ``forward`` of their own stay as they are, as do those whose weights are read past them
    (``nn.TransformerEncoderLayer``).

    Args:
        model: on the CPU, float32 or bfloat16; any mixture of them. A module that contains linear layers, not one.

    Returns:
        The same model.

    Raises:
        RegroupError: the model is not on the CPU, has no linear layer of these dtypes, or this PyTorch cannot pack.
            The model is as it was.
    """
    past = {
        id(child)
        for each in model.modules()
        if isinstance(each, nn.TransformerEncoderLayer)
        for child in each.children()
    }
    found = {
        name: module
        for name, module in model.named_modules()
        if name and id(module) not in past and _weight(module) is not None
    }
    weights = {name: _weight(module) for name, module in found.items()}
    elsewhere = {name: weight.device for name, weight in weights.items() if weight is not None and _off_cpu(weight)}
    if elsewhere:
        name, device = next(iter(elsewhere.items()))
        raise RegroupError(
            "linear layers are packed for CPUs alone",
            tensor=f"{name}.weight",
            expected="cpu",
            got=device,
            remedy="leave prepare_for_inference out on other devices",
        )
    dtypes = {weight.dtype for weight in weights.values() if weight is not None}
    reasons = {dtype: unavailable(dtype) for dtype in dtypes}
    wanted = [name for name, weight in weights.items() if weight is not None and reasons[weight.dtype] is None]
    if not found and any(isinstance(module, PackedLinear) for module in model.modules()):
        return model
    if not wanted:
        raise RegroupError(
            "no linear layer can be packed",
            expected="linear layers of float32 or bfloat16, and PyTorch with oneDNN",
            got="; ".join(str(reason) for reason in reasons.values()) or "no plain linear layer",
            remedy="use the model as it is",
        )
    del weights
    model.eval().requires_grad_(False)
    made: dict[int, PackedLinear] = {}
    for name in wanted:
        module: Any = found.pop(name)
        # A module that is in two places stays one.
        weight = _weight(module)
        assert weight is not None
        packed = made.get(id(module)) or PackedLinear(weight, module.bias)
        made[id(module)] = packed
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, packed)
        del module, weight
    return model


def _weight(module: Any) -> Tensor | None:
    """The weight (out, in) of a module that is a plain linear layer, and does nothing beside."""
    if "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks:
        return None
    if type(module) is nn.Linear or type(module).__name__ == "FalconLinear":
        return module.weight if module.weight.numel() else None
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2's, (in, out)
        return module.weight.t()
    return None


def _off_cpu(weight: Tensor) -> bool:
    return weight.device.type != "cpu"
