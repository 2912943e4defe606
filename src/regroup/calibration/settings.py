"""How to calibrate."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..plans import DEFAULT_REPAIR, Plan


@dataclass(frozen=True)
class DistillSettings:
    """How a layer is distilled.

    Attributes:
        learning_rate: the largest change of a weight in a step of Adam, relative to the root mean square of its matrix.
        warmup: share of the steps.
        passes: over the text, each in an order of its own.
    """

    learning_rate: float = 0.01
    warmup: float = 0.05
    passes: int = 8
    betas: tuple[float, float] = (0.9, 0.95)


@dataclass(frozen=True)
class Settings:
    """How to calibrate, beyond the methods that the plan names for each layer.

    Attributes:
        search: look for heads that belong together, where the plan names no order and the family allows one.
        repair: ``"none"``, ``"output"`` (solve the output projection again) or ``"distill"`` (train the layer's
            attention before that).
        held_out: share of the batches that is judged on and never fitted,
        held_out_tokens: and how many tokens of them at most, at one batch at least.
        judged_on: tokens to fit candidates on, at least ``judged_rows`` for each input of the output projection; what
            is chosen is fitted on all of the text.
        distillation: see there.
        seed: of the search.
    """

    search: bool = True
    repair: str = DEFAULT_REPAIR
    held_out: float = 0.125
    held_out_tokens: int = 16_384
    judged_on: int = 4_096
    judged_rows: int = 4
    distillation: DistillSettings = field(default_factory=DistillSettings)
    seed: int = 0

    def held_out_batches(self, count: int, tokens: int) -> int:
        """How many batches of so many tokens are held out, of ``count``."""
        return max(1, min(round(count * self.held_out), self.held_out_tokens // tokens))

    @classmethod
    def of(cls, plan: Plan) -> Settings:
        """The settings that a plan asks for."""
        return cls(search=plan.grouping == "search", repair=plan.repair or DEFAULT_REPAIR, seed=plan.seed)
