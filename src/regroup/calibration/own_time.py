"""How long a model will take to write its calibration text and to be calibrated on it: from a moment's work here."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.dtypes import TORCH_DTYPES
from ..families import is_encoder_decoder
from ..generation.loading import BATCH, sampling_dtype
from ..layout import Layout
from ..plans import CalibrationText
from ..solver.heads import projection_tensors
from .own_text import own_sizes
from .settings import Settings

# Calibration takes about as long as so many products of all weights with the text, beside the calls themselves, and a
# pass of distillation as long as so many of the attention's weights: seen with SmolLM2-135M, with the comparisons after
# it.
_PASSES, _TRAINED = 8, 6
# Seconds of a decoder layer's calls, however small it is.
_CALLS = 1e-3
# Weights that are read once a step do not come from a cache.
_COLD_BYTES = 64 << 20


@dataclass(frozen=True)
class OwnTextAhead:
    """What own text will take.

    Attributes:
        tokens: that the model writes.
        sampling_seconds: to write them.
        calibration_seconds: to calibrate on all of the text.
    """

    tokens: int
    sampling_seconds: float
    calibration_seconds: float


def own_text_ahead(
    text: CalibrationText,
    settings: Settings,
    checkpoint: Checkpoint,
    config: dict[str, Any],
    layout: Layout,
    device: str,
) -> OwnTextAhead:
    """Estimate both, from the products of a few matrices of the model's width, timed just now.

    Args:
        text: what is to be written; nothing is where a file with it is given.
        settings: of calibration.
        checkpoint, config, layout: of the original model.
        device: where it runs.
    """
    count, length = own_sizes(text, config)
    width, layers = layout.hidden_size, layout.layers[-1].index + 1
    parameters = sum(math.prod(info.shape) for info in checkpoint.tensors.values() if info.dtype in TORCH_DTYPES)
    dtype = sampling_dtype(checkpoint.folder, device)
    step = parameters * _per_weight(width, min(BATCH, count), dtype, device) + layers * _CALLS
    steps = math.ceil(text.own_tokens / length / BATCH) * length
    if is_encoder_decoder(config):
        steps *= 2  # the source is written too
    worked = _PASSES * parameters
    if settings.repair == "distill":
        names = {name for layer in layout.layers for name in projection_tensors(layer)}
        attention = sum(math.prod(checkpoint.tensors[name].shape) for name in names)
        worked += settings.distillation.passes * _TRAINED * attention
    products = worked * _per_weight(width, 1024, torch.float32, device) / 1024
    calls = _PASSES * layers * _CALLS * text.tokens / (text.batch_size(pairs=is_encoder_decoder(config)) * length)
    return OwnTextAhead(
        text.own_tokens,
        0.0 if text.written is not None else steps * step,
        products * text.tokens + calls,
    )


def _per_weight(width: int, rows: int, dtype: torch.dtype, device: str) -> float:
    """Seconds per weight of a product of so many rows with weights that are in no cache."""
    number = max(2, min(32, _COLD_BYTES // (4 * width * width * dtype.itemsize)))
    states = torch.zeros((rows, width), dtype=dtype, device=device)
    weights = torch.zeros((number, 4 * width, width), dtype=dtype, device=device)

    def run() -> None:
        for weight in weights:
            torch.nn.functional.linear(states, weight)

    _timed(run, device)
    return _timed(run, device) / weights.numel()


def _timed(run: Callable[[], None], device: str) -> float:
    started = time.perf_counter()
    with torch.inference_mode():
        run()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
