"""How far a converted model's predictions are from the original's, by the hidden states after the last layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch

from ..processes import ProcessGroup
from .layer_runner import LayerRunner

K = TypeVar("K", bound=Hashable)
# Over a large vocabulary the logits of a window are larger than all else: they are made for so many positions at a
# time, and of those the terms of a divergence for fewer.
_POSITIONS, _TERMS = 128, 64


class HeldOut(Protocol):
    """The original model on held-out text.

    Attributes:
        runner: its layers on this process's text.
        held_out: numbers of this process's batches that are judged on.
        processes: those that share the text.
    """

    runner: LayerRunner
    held_out: range
    processes: ProcessGroup


@dataclass
class Compared(Generic[K]):
    """Sums over the positions of one window that hold text, in nats.

    Attributes:
        tokens: how many they are.
        predicted: how many of them have a next token.
        kl: KL divergence of the original model's predictions from each converted model's.
        loss, losses: cross-entropy of the original model and of each converted one on the next tokens.
    """

    tokens: int = 0
    predicted: int = 0
    kl: dict[K, float] = field(default_factory=dict)
    loss: float = 0.0
    losses: dict[K, float] = field(default_factory=dict)


def compare(
    runner: LayerRunner, batch: int, row: int, original: torch.Tensor, converted: Mapping[K, torch.Tensor]
) -> Compared[K]:
    """Compare predictions on one window.

    Args:
        runner: of the original model on this text.
        batch, row: the window.
        original, converted: hidden states after the last layer of the whole batch, (B, T, hidden).
    """
    inputs = runner.batches[batch]
    ids = inputs["decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"][row].cpu()
    mask, _ = runner.masks(batch, runner.layout.layers[0])
    keep = torch.ones(len(ids), dtype=torch.bool) if mask is None else mask[row].bool().cpu()
    followed = keep & torch.cat([keep[1:], keep.new_zeros(1)])
    following = torch.cat([ids[1:], ids[:1]])
    found = Compared[K](int(keep.sum()), int(followed.sum()), dict.fromkeys(converted, 0.0), 0.0)
    found.losses = dict.fromkeys(converted, 0.0)
    for start in range(0, len(ids), _POSITIONS):
        part = slice(start, start + _POSITIONS)
        expected = runner.logits(batch, original, row, part)
        found.loss += _loss(expected, following[part], followed[part])
        for key, states in converted.items():
            got = runner.logits(batch, states, row, part)
            found.kl[key] += float(_divergence(expected, got).cpu()[keep[part]].double().sum())
            found.losses[key] += _loss(got, following[part], followed[part])
    return found


def divergences(
    converter: HeldOut, original: list[torch.Tensor], converted: Mapping[K, list[torch.Tensor]]
) -> dict[K, float]:
    """Mean KL divergence from the original model's predictions on held-out text, in nats per token.

    Args:
        converter: the original model on its text.
        original: its hidden states after the last layer, for each batch.
        converted: those of converted models, for each held-out batch.
    """
    runner, processes = converter.runner, converter.processes
    totals, tokens = dict.fromkeys(converted, 0.0), 0
    for place, batch in enumerate(converter.held_out):
        for row in range(len(original[batch])):
            states = {key: each[place] for key, each in converted.items()}
            found = compare(runner, batch, row, original[batch], states)
            tokens += found.tokens
            for key, value in found.kl.items():
                totals[key] += value
    tokens = processes.sum(tokens)
    return {key: max(processes.sum(total) / tokens, 0.0) for key, total in totals.items()}


def _loss(logits: torch.Tensor, following: torch.Tensor, counted: torch.Tensor) -> float:
    """Sum of the cross-entropy of logits (T, V) on tokens (T,), where they count."""
    place = following.to(logits.device).unsqueeze(-1)
    each = logits.logsumexp(-1) - logits.gather(-1, place).squeeze(-1)
    return float(each.cpu()[counted].double().sum())


def _divergence(expected: torch.Tensor, got: torch.Tensor) -> torch.Tensor:
    """KL divergence (T,) in nats of logits (T, V) from those that are expected."""
    parts = []
    for logits in zip(expected.split(_TERMS), got.split(_TERMS), strict=True):
        log_p, log_q = (each.log_softmax(-1) for each in logits)
        parts.append((log_p.exp() * (log_p - log_q)).sum(-1))
    return torch.cat(parts)
