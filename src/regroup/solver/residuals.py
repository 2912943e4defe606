"""What is lost when heads of one layer share a key or a value: residual energies, keys and values each by themselves.

Energies are those of ``merge.residual``: a bound on what linear sharing can keep in the metric of the statistics, not
the model's loss.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..layout.types import AttentionLayer
from ..merge.residual import linear_residual, pair_residuals, rotary_residual
from ..merge.rotary import Pairs
from .statistics import LayerStatistics


@dataclass(frozen=True)
class PartResiduals:
    """Keys or values of the units that may share a head.

    Units are KV heads, or query heads that each have a copy of their KV head.

    Attributes:
        grams: Γ of each unit, (units, D, D) float64.
        moments: of the stacked units, (units·D, units·D) float64.
        rotary: pairs and dim of RoPE (see ``merge.rotary``), or None where nothing rotates.
    """

    grams: torch.Tensor
    moments: torch.Tensor
    rotary: tuple[Pairs, int] | None

    def of(self, members: tuple[int, ...]) -> tuple[float, float]:
        """Energy that these units lose when they share one head, and their energy."""
        units, D, _ = self.grams.shape
        index = torch.tensor(members)
        blocks = self.moments.view(units, D, units, D)[index][:, :, index]
        own = blocks.reshape(len(members) * D, len(members) * D)
        if self.rotary is None:
            return linear_residual(self.grams[index], own, range(len(members)))
        return rotary_residual(self.grams[index], own, range(len(members)), pairs=self.rotary[0], dim=self.rotary[1])

    def pairs(self) -> torch.Tensor:
        """Share of their energy that any two units lose when they share one head, (units, units) float64."""
        return pair_residuals(self.grams, self.moments, self.rotary)

    @cached_property
    def energies(self) -> list[float]:
        """The energy of each unit."""
        return [self.of((unit,))[1] for unit in range(len(self.grams))]


class LayerResiduals:
    """Keys and values of one layer, as far as linear maps pass through them.

    Args:
        layer: of the original model.
        statistics: of all heads as one group in their own order.
        groups: the number of groups that are looked for: units are KV heads where a group can hold whole ones, else
            query heads.
    """

    def __init__(self, layer: AttentionLayer, statistics: LayerStatistics, groups: int) -> None:
        H, G, D = layer.num_attention_heads, layer.num_key_value_heads, layer.head_dim
        self.units, self.queries_per_unit = (G, H // G) if G % groups == 0 else (H, 1)
        place = torch.arange(self.units) // (self.units // G)

        def spread(stacked: torch.Tensor) -> torch.Tensor:
            blocks = stacked.view(G, D, G, D)[place][:, :, place]
            return blocks.reshape(self.units * D, self.units * D)

        def summed(grams: torch.Tensor) -> torch.Tensor:
            return grams.double().view(self.units, self.queries_per_unit, D, D).sum(1)

        moments, rotary = statistics.moments, layer.rotary
        self.key = self.value = None
        if layer.key_obstacle is None:
            rotation = None if rotary is None else (rotary.pairs, rotary.dim)
            self.key = PartResiduals(summed(moments.query), spread(moments.key[0]), rotation)
        if layer.value_obstacle is None:
            output = statistics.weights.output.double()
            self.value = PartResiduals(summed(output @ output.mT), spread(moments.value[0]), None)
        self.parts = [part for part in (self.key, self.value) if part is not None]
        self._energies = [sum(part.energies) for part in self.parts]

    def cost(self, members: tuple[int, ...]) -> float:
        """What these units lose by sharing, as shares of the layer's energy, keys and values added up."""
        return sum(
            part.of(members)[0] / energy for part, energy in zip(self.parts, self._energies, strict=True) if energy > 0
        )

    def pair_costs(self) -> torch.Tensor:
        """The cost of any two units, (units, units) float64."""
        table = torch.zeros(self.units, self.units, dtype=torch.float64)
        for part, energy in zip(self.parts, self._energies, strict=True):
            own = torch.tensor(part.energies)
            if energy > 0:
                table += part.pairs() * (own + own.unsqueeze(1)) / energy
        return table
