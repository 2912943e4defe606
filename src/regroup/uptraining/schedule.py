"""Learning rates over a run, as multiples of the recipe's rate."""

from __future__ import annotations

import math
from collections.abc import Callable

SCHEDULES = ("cosine", "constant-decay", "constant", "inverse-sqrt")
# Raffel et al. 2020, arXiv:1910.10683, section 3.1.2: 1 / sqrt(max(n, k)) at step n, with k = 10⁴.
T5_WARM_UP = 10_000


def schedule(
    name: str, steps: int, *, warmup: float = 0.0, decay: float = 0.2, original_steps: int = 0, floor: float = 0.0
) -> Callable[[int], float]:
    """The factor of the learning rate in step t = 0, 1, …, ``steps - 1``.

    With w = round(warmup · steps), every schedule but the last first rises: (t + 1) / w while t < w.

    - ``"cosine"``: (1 + cos π x) / 2, x = (t - w) / (steps - w). Re-warming and re-decaying after a new warm-up is how
      Ibrahim et al. 2024 (arXiv:2403.08763) continue a pre-training whose rate had decayed.
    - ``"constant-decay"``: 1, then linear to 0 over the last round(decay · steps) steps (Hu et al. 2024,
      arXiv:2404.06395, section 4: warm-up, stable, decay).
    - ``"constant"``: 1.
    - ``"inverse-sqrt"``: T5's 1 / sqrt(max(n, 10⁴)) (Raffel et al. 2020, arXiv:1910.10683, section 3.1.2) continued
      from step n = original_steps + t, divided by its value at t = 0. So the recipe's rate is that of the first step,
      and T5's own is 1 / sqrt(max(original_steps, 10⁴)): 0.001 after a million steps. There is no warm-up.

    Args:
        name: one of ``SCHEDULES``.
        steps: of the run.
        warmup, decay: shares of the steps.
        original_steps: of the pre-training that is continued, for ``"inverse-sqrt"``.
        floor: the factor that ``"cosine"`` and ``"constant-decay"`` end at.
    """
    assert name in SCHEDULES, name
    rising = round(warmup * steps)
    falling = round(decay * steps)

    def factor(step: int) -> float:
        if name == "inverse-sqrt":
            return math.sqrt(max(original_steps, T5_WARM_UP) / max(original_steps + step, T5_WARM_UP))
        if step < rising:
            return (step + 1) / rising
        if name == "cosine":
            done = min(1.0, (step - rising) / max(1, steps - rising))
            return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))
        if name == "constant-decay" and step >= steps - falling:
            return floor + (1 - floor) * max(0.0, (steps - step) / falling)
        return 1.0

    return factor
