"""The formats' names of dtypes, in torch's. Apart from the rest, which reads headers without importing torch."""

from __future__ import annotations

import torch

TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
