"""Mixed precision: the dtype that ``torch.autocast`` asks of attention."""

from __future__ import annotations

import torch
from torch import Tensor

# Devices with autocast. For any other device PyTorch raises an error when asked whether it is enabled.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` casts to on a device, or None if it is off."""
    if device.type not in _DEVICES or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def lowered(tensor: Tensor) -> Tensor:
    """A tensor in the dtype that autocast gives PyTorch's ``scaled_dot_product_attention``.

    Autocast runs that operator in lower precision: it casts every floating-point argument except float64
    (aten/src/ATen/autocast_mode.h, version 2.13).
    """
    dtype = autocast_dtype(tensor.device)
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
