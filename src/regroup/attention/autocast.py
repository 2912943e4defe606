"""Mixed precision: the dtype that ``torch.autocast`` asks of attention."""

from __future__ import annotations

import torch
from torch import Tensor

# Devices that have autocast; of others PyTorch refuses even to say whether it is on.
_DEVICES = ("cpu", "cuda", "xpu", "mps", "hpu", "mtia")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What ``torch.autocast`` casts to on a device, or None where it is off."""
    if device.type not in _DEVICES or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def lowered(tensor: Tensor) -> Tensor:
    """A tensor as autocast hands it to PyTorch's ``scaled_dot_product_attention``.

    That operator is of the kind that autocast runs in the lower precision: every floating argument but float64 is
    cast (aten/src/ATen/autocast_mode.h, version 2.13).
    """
    dtype = autocast_dtype(tensor.device)
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(dtype)
