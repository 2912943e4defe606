"""One pass over the decoder layers of the original model, with the statistics of each on the text.

Calibration and the measurement of sensitivity are this sweep; they differ in what they do at each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from ..layout.types import AttentionLayer
from ..plans import LayerPlan
from ..solver.heads import HeadWeights
from .decoder_layer import DecoderLayer
from .groupings import Groupings
from .layer_converter import LayerConverter


@dataclass(frozen=True)
class LayerVisit:
    """One decoder layer of the original model.

    Attributes:
        teacher: the layer.
        layers: its attention layers.
        groupings: the statistics of each attention layer that is to be solved, by name.
        outputs: for each attention layer by name what its output projection gave for each batch, (B, T, hidden).
        before, after: hidden states for each batch, (B, T, hidden).
    """

    teacher: DecoderLayer
    layers: list[AttentionLayer]
    groupings: dict[str, Groupings]
    outputs: dict[str, list[torch.Tensor]]
    before: list[torch.Tensor]
    after: list[torch.Tensor]


def sweep(
    converter: LayerConverter,
    wanted: Callable[[AttentionLayer], Sequence[LayerPlan]],
    hidden: list[torch.Tensor],
    *,
    start: int = 0,
) -> Iterator[LayerVisit]:
    """Visit the decoder layers in order.

    Args:
        converter: of the original model on its text.
        wanted: the plans that an attention layer is to be solved for; none to leave it as it is.
        hidden: hidden states before the first layer that is visited, for each batch.
        start: the number of that layer.
    """
    runner, settings = converter.runner, converter.settings
    for index in range(start, len(runner)):
        layers = runner.attention_layers(index)
        teacher = runner.layer(index)
        plans = {layer.name: wanted(layer) for layer in layers}
        groupings = {
            layer.name: Groupings(
                layer,
                HeadWeights.read(layer, converter.checkpoint.read),
                plans[layer.name],
                search=settings.search,
                seed=settings.seed,
            )
            for layer in layers
            if plans[layer.name]
        }
        outputs, after = converter.observe(teacher, layers, hidden, list(groupings.values()))
        yield LayerVisit(teacher, layers, groupings, outputs, hidden, after)
        hidden = after
