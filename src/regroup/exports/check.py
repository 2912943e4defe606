"""Compare the logits of an export with its source's; one model is loaded at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..devices import check_fits
from ..errors import RegroupError
from ..listener import Listener
from ..modeling import load
from ..opening import Source
from ..solver.rewrite import Change

ROWS, LENGTH = 2, 16
# Relative to the largest logit: float32 sums in another order differ by about 1e-6, a misplaced head by 1e-1.
TOLERANCE = 1e-3


def check_memory(source: Path, parameters: int, vocabulary: int, listener: Listener) -> None:
    """Report the memory of a comparison, and refuse one that would not fit, before anything is written.

    Args:
        source: what is exported, for the message.
        parameters: of the source or of the result, whichever has more.
        vocabulary: number of logits at each of ``ROWS`` · ``LENGTH`` positions.
        listener: gets the bytes that it takes: one model in float32, and three times its logits.

    Raises:
        RegroupError: it needs more than is free.
    """
    needed = 4 * (parameters + 3 * ROWS * LENGTH * vocabulary)
    check_fits(
        needed,
        "the comparison with the source does not fit into memory; nothing was written",
        file=source,
        got="one model in float32",
        remedy="pass --no-check and compare on a machine with more memory, or free some",
    )
    listener.comparison_ahead(needed)


def check_length(opened: Source) -> int:
    """Length of the compared sequences: at most a window, so that engines without windows compute the same."""
    return min([LENGTH, *(layer.window for layer in opened.layout.layers if layer.window is not None)])


def expect_memory(opened: Source, changed: Mapping[str, Change], listener: Listener) -> None:
    """Report the memory of the comparison at the end, from headers (see ``check_memory``)."""
    tensors = opened.checkpoint.tensors
    parameters = sum(math.prod((changed.get(name) or entry).shape) for name, entry in tensors.items())
    check_memory(opened.folder, parameters, opened.checkpoint.config.get("vocab_size", 0), listener)


@dataclass(frozen=True)
class Comparison:
    """The result of a comparison of logits.

    Attributes:
        loader: what loaded the result, with its version.
        positions: how many positions' logits were compared.
        largest: the largest difference between two logits.
        scale: the largest logit of the source.
        text: what else was compared, in words; may be empty.
    """

    loader: str
    positions: int
    largest: float
    scale: float
    text: str = ""

    def __str__(self) -> str:
        share = self.largest / self.scale if self.scale else self.largest
        agree = "identical logits" if self.largest == 0 else f"logits within {share:.1e} of the largest"
        return f"{self.loader}: {agree} at {self.positions} positions" + (f", {self.text}" if self.text else "")


def model_inputs(config: Any, *, length: int = LENGTH) -> dict[str, Tensor]:
    """The same random arguments for ``model(**inputs)`` on every call, for any family.

    Args:
        config: the transformers config of the model.
        length: positions of the decoder.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, config.vocab_size, (ROWS, length), generator=generator)
    if not config.is_encoder_decoder:
        return {"input_ids": ids}
    bins = getattr(config, "num_mel_bins", None)
    if bins is not None:
        frames = 2 * config.max_source_positions
        return {
            "input_features": torch.randn(ROWS, bins, frames, generator=generator),
            "decoder_input_ids": ids,
        }
    return {"input_ids": ids.flip(1), "decoder_input_ids": ids}


@torch.no_grad()
def logits(model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits (rows, positions, vocabulary) in float32; of a model without a head its last hidden states."""
    outputs = model.eval()(**inputs)
    return (outputs.logits if hasattr(outputs, "logits") else outputs.last_hidden_state).float()


def folder_logits(folder: Path, config: dict[str, Any] | None, *, length: int = LENGTH) -> Tensor:
    """Logits of a checkpoint folder, computed in float32.

    Args:
        folder: a checkpoint whose tensors transformers, or regroup's classes on top of it, can load.
        config: in place of its config.json, or None.
        length: see ``model_inputs``.
    """
    model = load(folder, progress=False, config=config, dtype=torch.float32)
    return logits(model, model_inputs(model.config, length=length))


def compare(source: Tensor, made: Tensor, loader: str, *, tolerance: float = TOLERANCE, text: str = "") -> Comparison:
    """Compare logits (…, vocabulary) of the source with those of the result.

    Raises:
        RegroupError: they differ by more than ``tolerance`` of the source's largest.
    """
    difference = (source - made).abs()
    largest, scale = float(difference.max()), float(source.abs().max())
    # In this form NaN fails.
    if not largest <= tolerance * scale:
        raise RegroupError(
            "the exported model's output differs from its source's; nothing was written",
            expected=f"logits within {tolerance:g} of the largest, {scale:.4g}",
            got=f"{largest:.4g} apart, loaded with {loader}",
            remedy="please report it with the checkpoint's config.json",
        )
    return Comparison(loader, source.shape[:-1].numel(), largest, scale, text)
