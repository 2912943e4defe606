"""The models of the experiments, and what all stages share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .settings import Scale
from .texts import Texts

OURS = "ours"
FAMILIES = ("encoder-decoder", "decoder")
PARENTS = ("large", "small", "scratch")  # scratch: the large one with one KV head from the start
UNTRAINED = "untrained"  # the large one before its pre-training


@dataclass(frozen=True)
class Variant:
    """A model of the experiments.

    Attributes:
        family: one of ``FAMILIES``.
        parent: one of ``PARENTS``, or ``UNTRAINED``.
        heads: KV heads it was converted to; None for the parent as it is.
        method: of conversion; ``OURS`` is calibrated and repaired on text, and distils the parent afterwards.
        alpha: share of the parent's pre-training; our way's calibration counts.
        seed: of uptraining and fine-tuning, and of ``random``.
    """

    family: str
    parent: str = "large"
    heads: int | None = None
    method: str = "mean"
    alpha: float = 0.0
    seed: int = 0

    @property
    def converted(self) -> str:
        """Name of the converted checkpoint, the same for all α; ``random`` is drawn anew for each seed."""
        if self.heads is None:
            return f"{self.family}-{self.parent}"
        drawn = f"-s{self.seed}" if self.method == "random" else ""
        return f"{self.family}-{self.parent}-{self.method}-{self.heads}{drawn}"

    @property
    def name(self) -> str:
        """Name of the model after uptraining."""
        return self.converted if self.alpha == 0 else f"{self.converted}-a{self.alpha:g}-s{self.seed}"


@dataclass(frozen=True)
class Bench:
    """What all stages share.

    Attributes:
        scale: every number.
        texts: on what.
        work: where everything is kept.
        device: ``"cpu"`` or ``"cuda"``.
    """

    scale: Scale
    texts: Texts
    work: Path
    device: str

    def pretraining_tokens(self, family: str) -> int:
        return self.scale.encoder_decoder_tokens if family == "encoder-decoder" else self.scale.decoder_tokens

    def parent(self, family: str, which: str) -> Path:
        if which == UNTRAINED:
            return self.work / "untrained" / family
        return self.work / "parents" / f"{family}-{which}" / "model"

    def checkpoint(self, variant: Variant) -> Path:
        """Where a variant's weights are, before fine-tuning."""
        if variant.alpha:
            return self.work / "uptrained" / variant.name / "model"
        if variant.heads is None:
            return self.parent(variant.family, variant.parent)
        return self.work / "children" / variant.converted
