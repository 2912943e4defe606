"""One pass over held-out batches: loss of a model, and its distance from the original model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from ..data import IGNORED, Batch
from ..data.batches import check_vocabulary
from ..errors import RegroupError


@dataclass(frozen=True)
class Score:
    """Means over predicted tokens.

    Attributes:
        tokens: how many were predicted.
        nats_per_token: cross-entropy.
        standard_error: of that mean, taking each row of a batch (window or pair) as one draw.
        teacher_nats_per_token: the original model's cross-entropy on the same tokens, or None.
        kl_nats_per_token: KL(original ‖ model), or None.
        top1_agreement: share of positions where both put the same token first, or None.
        teacher_standard_error, excess_standard_error: of the original model's cross-entropy, and of the
            difference, in which what makes a row hard for both drops out; or None.
    """

    tokens: int
    nats_per_token: float
    standard_error: float
    teacher_nats_per_token: float | None = None
    kl_nats_per_token: float | None = None
    top1_agreement: float | None = None
    teacher_standard_error: float | None = None
    excess_standard_error: float | None = None

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that overflows."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    def bits_per_byte(self, nbytes: int) -> float:
        """The loss per byte of the predicted text, in bits: comparable between tokenizers."""
        return self.nats_per_token * self.tokens / math.log(2) / nbytes


@torch.inference_mode()
def score(
    model: Any,
    batches: Iterable[Batch],
    *,
    teacher: Any = None,
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Score a causal or encoder-decoder model, and compare it with the original model where that is given.

    Logits are taken as the model computes them; softmax, loss and KL are computed in float32 and summed in float64.

    Args:
        model: a transformers model with a language-modelling head.
        batches: see ``causal_batches`` and ``pair_batches``.
        teacher: the original model, or None.
        progress: called with the number of rows after each batch.

    Raises:
        RegroupError: no batch, a token outside the vocabulary, or an original model with another vocabulary.
    """
    device = next(model.parameters()).device
    sums: list[tuple[float, int]] = []
    teacher_sums: list[tuple[float, int]] = []
    teacher_loss = kl = agreed = 0.0
    for batch in batches:
        targets = batch.targets.to(device)
        logits = _logits(model, batch, device)
        check_vocabulary(int(batch.targets.max()), logits.shape[-1])
        asked = targets != IGNORED
        wanted = targets.clamp(min=0).unsqueeze(-1)
        other = None if teacher is None else _logits(teacher, batch, device)
        if other is not None and other.shape != logits.shape:
            raise RegroupError("the teacher has another vocabulary", expected=logits.shape[-1], got=other.shape[-1])
        loss, theirs, apart, same = _by_token(logits, other, wanted)
        loss = loss * asked
        sums += zip(loss.double().sum(1).tolist(), asked.sum(1).tolist(), strict=True)
        if teacher is not None:
            theirs = (theirs * asked).double()
            teacher_loss += float(theirs.sum())
            teacher_sums += zip(theirs.sum(1).tolist(), asked.sum(1).tolist(), strict=True)
            kl += float((apart * asked).double().sum())
            agreed += float((same & asked).sum())
        if progress is not None:
            progress(len(targets))
    if not sums:
        raise RegroupError("there is nothing to evaluate on")
    total, tokens = sum(loss for loss, _ in sums), sum(count for _, count in sums)
    mean = total / tokens
    error = _standard_error(sums, mean, tokens)
    if teacher is None:
        return Score(tokens, mean, error)
    theirs = teacher_loss / tokens
    excess = [(loss - other, count) for (loss, count), (other, _) in zip(sums, teacher_sums, strict=True)]
    return Score(
        tokens,
        mean,
        error,
        theirs,
        kl / tokens,
        agreed / tokens,
        _standard_error(teacher_sums, theirs, tokens),
        _standard_error(excess, mean - theirs, tokens),
    )


def _by_token(logits: torch.Tensor, other: torch.Tensor | None, wanted: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """What is known of each token, from logits (B, T, V) of the model and of its teacher.

    A row at a time: in float32, copies of all logits would take several times the model.

    Returns:
        Cross-entropy of the model and of the teacher, KL from teacher to model, and whether both put the same token
        first, each (B, T); the last three are zero without a teacher.
    """
    rows = []
    for number, (row, goal) in enumerate(zip(logits, wanted, strict=True)):
        log_p = row.float().log_softmax(-1)
        loss = -log_p.gather(-1, goal).squeeze(-1)
        if other is None:
            rows.append((loss, *[torch.zeros_like(loss)] * 2, torch.zeros_like(loss, dtype=torch.bool)))
            continue
        log_q = other[number].float().log_softmax(-1)
        theirs = -log_q.gather(-1, goal).squeeze(-1)
        rows.append((loss, theirs, (log_q.exp() * (log_q - log_p)).sum(-1), log_q.argmax(-1) == log_p.argmax(-1)))
    return tuple(torch.stack(column) for column in zip(*rows, strict=True))


def _standard_error(sums: list[tuple[float, int]], mean: float, tokens: int) -> float:
    """Of a ratio of sums, by linearisation: rows differ in length."""
    n = len(sums)
    if n < 2:
        return math.nan
    spread = sum((loss - mean * count) ** 2 for loss, count in sums) / (n - 1)
    return math.sqrt(spread * n) / tokens


def _logits(model: Any, batch: Batch, device: torch.device) -> torch.Tensor:
    inputs = {name: value.to(device) for name, value in batch.inputs.items()}
    size = model.config.get_text_config().vocab_size
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            check_vocabulary(int(inputs[name].max()), size)
    return model(**inputs, use_cache=False).logits
