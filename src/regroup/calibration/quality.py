"""What a conversion cost, on text that was neither fitted nor chosen on; and what mean-pooling would have cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..layout.types import AttentionLayer, Layout
from ..plans import LayerPlan, Plan
from ..solver.solve import LayerSolution, solve_by_weights
from .decoder_layer import DecoderLayer
from .divergence import Compared, compare
from .install import install
from .joint import token_count
from .layer_runner import Inputs, LayerRunner

# At most so many tokens, and this share of the text, are kept for it.
_TOKENS, _SHARE = 2048, 8


@dataclass(frozen=True)
class Quality:
    """Losses on held-out text, in nats per token.

    Attributes:
        tokens, windows: how much text it was.
        loss, converted_loss: cross-entropy of the original and of the converted model.
        kl: KL divergence of the original model's predictions from the converted model's. On text that the original
            model wrote itself its expectation is the difference of the two losses.
        kl_error: standard error of ``kl`` over windows; None for a single one.
        pooled_kl: the same divergence where the heads of each group are mean-pooled (the paper's conversion).
        separate: whether the text was kept apart from what methods were chosen on; there may be too little for that.
    """

    tokens: int
    windows: int
    loss: float
    converted_loss: float
    kl: float
    kl_error: float | None
    pooled_kl: float
    separate: bool

    @property
    def worse_than_pooling(self) -> bool:
        """Whether mean-pooling loses less. Numbers that are not finite are worse than any others."""
        return math.isfinite(self.pooled_kl) and not self.kl <= self.pooled_kl

    def to_json(self) -> dict[str, Any]:
        """For the record; JSON has no numbers that are not finite."""
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(self).items()
        }


def set_apart(batches: Sequence[Inputs]) -> tuple[list[Inputs], list[Inputs], bool]:
    """Calibration text, text to measure the quality on, and whether the two are separate."""
    size = max(1, token_count(batches[:1]))
    count = max(1, min(len(batches) // _SHARE, _TOKENS // size))
    if len(batches) < 4:
        return list(batches), list(batches[-1:]), False
    return list(batches[:-count]), list(batches[-count:]), True


@torch.no_grad()
def measure_quality(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    batches: Sequence[Inputs],
    solution: Callable[[str], LayerSolution],
    *,
    separate: bool = True,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
) -> Quality:
    """Run the original model, the converted one and a mean-pooled one on the same text, layer by layer.

    Args:
        checkpoint, layout: of the original model.
        plan: that was carried out.
        batches: model inputs.
        solution: gives the solution of a converted layer by name.
        separate: see ``Quality``.
        device: where layers run.
        progress: called with 1 after each decoder layer.
    """
    runner = LayerRunner(checkpoint.folder, layout, batches, device=device)
    wants = {want.name: want for want in plan.layers}
    original = list(runner.hidden)
    converted, pooled = list(original), list(original)
    for index in range(len(runner)):
        layer = runner.layer(index)
        here = [each for each in runner.attention_layers(index) if wants[each.name].changes]
        for states, solved in (
            (converted, lambda each: solution(each.name)),
            (pooled, lambda each: _pooled_solution(checkpoint, each, wants[each.name])),
        ):
            other = layer.copy() if here else layer
            for attention in here:
                found = solved(attention)
                install(other, attention, found.want, found.tensors, checkpoint)
            _advance(other, states)
        _advance(layer, original)
        if progress is not None:
            progress(1)
    rows = [
        compare(runner, batch, row, states, {"converted": converted[batch], "pooled": pooled[batch]})
        for batch, states in enumerate(original)
        for row in range(len(states))
    ]
    rows = [row for row in rows if row.tokens]
    tokens = sum(row.tokens for row in rows)
    predicted = max(1, sum(row.predicted for row in rows))

    def mean(value: Callable[[Compared[str]], float], per: int = tokens) -> float:
        return sum(map(value, rows)) / per

    kl = mean(lambda row: row.kl["converted"])
    # Of a mean over tokens in windows that need not be equally long.
    spread = sum((row.kl["converted"] - kl * row.tokens) ** 2 for row in rows)
    count = len(rows)
    return Quality(
        tokens=tokens,
        windows=count,
        loss=mean(lambda row: row.loss, predicted),
        converted_loss=mean(lambda row: row.losses["converted"], predicted),
        kl=max(kl, 0.0) if math.isfinite(kl) else kl,
        kl_error=math.sqrt(spread * count / (count - 1)) / tokens if count > 1 else None,
        pooled_kl=mean(lambda row: row.kl["pooled"]),
        separate=separate,
    )


def _pooled_solution(checkpoint: Checkpoint, layer: AttentionLayer, want: LayerPlan) -> LayerSolution:
    """A layer with the heads of each group mean-pooled (paper, section 2.1), in the plan's order of heads."""
    plain = replace(want, key_method="mean", value_method="mean")
    return solve_by_weights(layer, plain, checkpoint.read, checkpoint.tensors)


def _advance(layer: DecoderLayer, states: list[torch.Tensor]) -> None:
    for batch, hidden in enumerate(states):
        states[batch] = layer.forward(batch, hidden).cpu()
