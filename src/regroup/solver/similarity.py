"""How similar a layer's KV heads are: what any two of them, or neighbouring groups, lose when they share one.

From the weights alone, as if inputs were white. Losses are residual energies (``regroup.merge.residual``), each as a
share of the energy of the heads that share: a bound on what linear sharing can keep, not the model's loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..checkpoint import Checkpoint
from ..errors import RegroupError
from ..layout.types import AttentionLayer, Kind, Layout
from .heads import HeadWeights
from .residuals import LayerResiduals, PartResiduals
from .statistics import ungrouped_statistics


@dataclass(frozen=True)
class HeadSimilarity:
    """Keys, values or both of one layer.

    Attributes:
        pairs: share of energy lost when KV heads a and b share one, (G, G) float64, from 0 to 1/2.
        contiguous: the same of all groups together when neighbouring KV heads share, for each divisor of G below it.
    """

    pairs: torch.Tensor
    contiguous: dict[int, float]

    @property
    def upper(self) -> torch.Tensor:
        """Every pair once, (G·(G-1)/2,), in the order of ``torch.triu_indices``."""
        first, second = torch.triu_indices(len(self.pairs), len(self.pairs), 1)
        return self.pairs[first, second]

    @property
    def median(self) -> float:
        """Of the pairs; between the middle two where their number is even."""
        return float(self.upper.quantile(0.5))

    @property
    def least(self) -> float:
        """What the most similar pair loses."""
        return float(self.upper.min())

    @property
    def most_similar(self) -> tuple[int, int]:
        """The pair that loses least, by KV head numbers; the first of several."""
        first, second = torch.triu_indices(len(self.pairs), len(self.pairs), 1)
        best = int(self.upper.argmin())
        return int(first[best]), int(second[best])

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "pairs": self.pairs.tolist(),
            "median": self.median,
            "least": self.least,
            "most_alike": list(self.most_similar),
            "contiguous": {str(groups): share for groups, share in self.contiguous.items()},
        }


@dataclass(frozen=True)
class LayerSimilarity:
    """One attention layer with more than one KV head.

    Attributes:
        name, kind, index, num_key_value_heads: as in the layout.
        key, value: None where an obstacle stands in the way.
        key_obstacle, value_obstacle: what keeps linear maps from passing through (see ``AttentionLayer``), or None.
    """

    name: str
    kind: Kind
    index: int
    num_key_value_heads: int
    key: HeadSimilarity | None
    value: HeadSimilarity | None
    key_obstacle: str | None = None
    value_obstacle: str | None = None

    @property
    def both(self) -> HeadSimilarity | None:
        """The mean of keys and values; None unless both are there."""
        if self.key is None or self.value is None:
            return None
        shares = {g: (share + self.value.contiguous[g]) / 2 for g, share in self.key.contiguous.items()}
        return HeadSimilarity((self.key.pairs + self.value.pairs) / 2, shares)

    @property
    def overall(self) -> HeadSimilarity | None:
        """Both together, or the one of them that can be compared."""
        return self.both or self.key or self.value

    def to_json(self) -> dict[str, Any]:
        """Plain data: what cannot be compared is null, and its obstacle says why."""
        parts = {"key": self.key, "value": self.value, "both": self.both}
        return {
            "name": self.name,
            "kind": self.kind,
            "index": self.index,
            "num_key_value_heads": self.num_key_value_heads,
            **{name: None if part is None else part.to_json() for name, part in parts.items()},
            "key_obstacle": self.key_obstacle,
            "value_obstacle": self.value_obstacle,
        }


def compare_heads(
    checkpoint: Checkpoint, layout: Layout, *, progress: Callable[[int], None] | None = None
) -> list[LayerSimilarity]:
    """Compare the KV heads of every layer that has more than one, reading one layer's weights at a time.

    Args:
        checkpoint, layout: of the model.
        progress: called with 1 after each attention layer.

    Raises:
        RegroupError: no layer has heads that can be compared, or weights are not finite.
    """
    found = []
    for layer in layout.layers:
        if layer.num_key_value_heads > 1:
            found.append(_compare(layer, checkpoint))
        if progress is not None:
            progress(1)
    if not any(layer.overall for layer in found):
        reasons = {f"keys: {layer.key_obstacle}; values: {layer.value_obstacle}" for layer in found}
        raise RegroupError(
            "no layer of this model has KV heads that can be compared",
            file=checkpoint.folder,
            expected="layers with several KV heads, through whose keys or values a linear map can pass",
            got="; ".join(sorted(reasons)) or "one KV head in every layer",
            remedy="merge by --method mean, first or random, and measure with regroup evaluate" if reasons else None,
        )
    return found


def _compare(layer: AttentionLayer, checkpoint: Checkpoint) -> LayerSimilarity:
    statistics = ungrouped_statistics(HeadWeights.read(layer, checkpoint.read))
    # Query heads that have a KV head in common weigh it together.
    residuals = LayerResiduals(layer, statistics, layer.num_key_value_heads)
    key, value = (None if part is None else _similarity(part) for part in (residuals.key, residuals.value))
    return LayerSimilarity(
        name=layer.name,
        kind=layer.kind,
        index=layer.index,
        num_key_value_heads=layer.num_key_value_heads,
        key=key,
        value=value,
        key_obstacle=layer.key_obstacle,
        value_obstacle=layer.value_obstacle,
    )


def _similarity(part: PartResiduals) -> HeadSimilarity:
    heads = len(part.grams)
    contiguous = {}
    for groups in (g for g in range(heads - 1, 0, -1) if heads % g == 0):
        size = heads // groups
        found = [part.of(tuple(range(g * size, (g + 1) * size))) for g in range(groups)]
        lost, total = (sum(column) for column in zip(*found, strict=True))
        contiguous[groups] = lost / total if total > 0 else 0.0
    return HeadSimilarity(part.pairs(), contiguous)
