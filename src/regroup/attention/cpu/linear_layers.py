"""Linear layers for decoding on CPUs: plain weights with a kernel for few rows, or weights in oneDNN's layout.

With few rows, as in decoding, PyTorch's ``F.linear`` on CPUs reads its weights at a fraction of the memory bandwidth
(times: docs/decoding.md). :class:`DirectLinear` uses a compiled kernel for few rows (``linear.cpp``), and PyTorch for
many. :class:`PackedLinear` uses oneDNN's layout; it is for machines without a compiler, or where oneDNN has
instructions that the kernel does not use. PyTorch's public way to that layout, ``torch.utils.mkldnn``, converts the
activations in every call and does not keep the fast layout. This module uses the two operators that ``torch.compile``
uses for oneDNN on CPUs, and tries them before it changes a weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ...errors import RegroupError
from .build import has_short_vectors, unsupported_reason
from .linear import linear as linear_of_few_rows
from .linear import serves

DTYPES = (torch.float32, torch.bfloat16)
# Elements of weights widened to float32 at once: 16 MiB, enough rows for a matrix product at full speed.
_WIDENED = 2**22


class PackedLinear(nn.Module):
    """``nn.Linear`` for inference on CPUs, with the weight in oneDNN's layout: x (…, in) to (…, out).

    Args:
        weight: (out, in), float32 or bfloat16, on the CPU. It is copied.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Without a row count the layout suits any. Not in the state dict, whose weights others should be able to read.
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.register_buffer("weight", packed, persistent=False)
        # The operator assumes that a bias is contiguous.
        self.register_buffer("bias", None if bias is None else bias.detach().contiguous(), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            raise RegroupError(
                "a prepared model has no gradients",
                remedy="run under torch.no_grad(), or train the loaded model without preparing it",
            )
        if states.dtype != self.weight.dtype:
            raise RegroupError(
                "the states of a packed linear layer have another dtype than its weight",
                expected=self.weight.dtype,
                got=states.dtype,
                remedy="convert the model before prepare_for_inference, and do not use torch.autocast after it",
            )
        if states.shape[-1:] != (self.in_features,):
            raise RegroupError(
                "the states do not match a packed linear layer",
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
            "a prepared model cannot be copied or pickled: its weights are in a machine-specific layout",
            layer=repr(self),
            remedy="copy the model before prepare_for_inference",
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        raise RegroupError(
            "a prepared model cannot be saved: its weights are in a machine-specific layout",
            tensor=f"{prefix}weight",
            remedy="save the model before prepare_for_inference, or keep the checkpoint that it was loaded from",
        )


class DirectLinear(nn.Module):
    """``nn.Linear`` for inference on CPUs: the compiled kernel for few rows, PyTorch for many. x (…, in) to (…, out).

    Many rows of bfloat16 are multiplied in float32, with weights widened for the call: on processors without bfloat16
    products, PyTorch emulates them, several times slower. Large weights are widened in parts, to limit memory.

    Args:
        weight: (out, in). It is shared, not copied, unless it is a transposed view.
        bias: (out,) or None.

    Attributes:
        stored_transposed: whether state dicts hold the weight as (in, out), as the replaced layer did.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.stored_transposed = False
        self.weight = _parameter(weight)
        self.bias = None if bias is None else _parameter(bias)

    def forward(self, states: Tensor) -> Tensor:
        if serves(states, self.weight, self.bias):
            return linear_of_few_rows(states, self.weight, self.bias)
        if states.dtype == self.weight.dtype == torch.bfloat16 and states.device.type == "cpu":
            return self._widened(states)
        return linear(states, self.weight, self.bias)

    def _widened(self, states: Tensor) -> Tensor:
        wide, bias = states.float(), None if self.bias is None else self.bias.float()
        step = max(1, _WIDENED // self.in_features)
        if step >= self.out_features:
            return linear(wide, self.weight.float(), bias).to(states.dtype)
        out = states.new_empty((*states.shape[:-1], self.out_features))
        for start in range(0, self.out_features, step):
            rows = slice(start, start + step)
            out[..., rows] = linear(wide, self.weight[rows].float(), None if bias is None else bias[rows])
        return out

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.stored_transposed:
            destination[f"{prefix}weight"] = destination[f"{prefix}weight"].t()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any, **named: Any) -> None:
        name = f"{prefix}weight"
        if self.stored_transposed and name in state_dict:
            state_dict = {**state_dict, name: state_dict[name].t().contiguous()}
        super()._load_from_state_dict(state_dict, prefix, *others, **named)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def _parameter(tensor: Tensor) -> nn.Parameter:
    if isinstance(tensor, nn.Parameter) and tensor.is_contiguous():
        return tensor
    return nn.Parameter(tensor.detach().contiguous(), requires_grad=False)


def fast_layer(dtype: torch.dtype) -> tuple[type[DirectLinear | PackedLinear] | None, str]:
    """The class of fast linear layers for a dtype on this machine, or None; and why.

    :class:`DirectLinear` if its kernel is the fastest, or is available and oneDNN's layout is not; otherwise
    :class:`PackedLinear`.
    """
    if dtype not in DTYPES:
        return None, f"{dtype} is not supported; float32 and bfloat16 are"
    # Measured: with AVX-512, oneDNN's layers have instructions for bfloat16 that the kernel has not.
    if has_short_vectors():
        return DirectLinear, "the compiled kernel is the fastest on this processor"
    not_packed = packed_unsupported_reason(dtype)
    if not_packed is None:
        return PackedLinear, "oneDNN's layout"
    no_kernel = unsupported_reason()
    if no_kernel is None:
        return DirectLinear, f"the compiled kernel: {not_packed}"
    return None, f"{not_packed}; the compiled kernel is not available: {no_kernel}"


def packed_unsupported_reason(dtype: torch.dtype) -> str | None:
    """The reason why weights of a dtype cannot be packed here, or None; it computes and compares a small product."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch was built without oneDNN"
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 32, generator=generator).to(dtype)
    states = torch.randn(2, 3, 32, generator=generator).to(dtype)
    try:
        with torch.no_grad():
            found = PackedLinear(weight, weight[:, 0])(states)
    except (AttributeError, RuntimeError, NotImplementedError, TypeError) as error:
        return f"oneDNN's operators of PyTorch {torch.__version__} do not work: {str(error).splitlines()[0][:120]}"
    wanted = linear(states, weight, weight[:, 0])
    error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max()
    if not error < (1e-5 if dtype == torch.float32 else 2e-2):
        return f"oneDNN's operators of PyTorch {torch.__version__} give wrong results (relative error {error:.1e})"
    return None
