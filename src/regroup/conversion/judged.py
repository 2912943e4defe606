"""After a conversion on text: what it cost, and mean-pooling in its place where that costs less."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ..errors import RegroupError
from ..listener import Listener
from ..opening import Source
from ..plans import Plan
from ..solver.store import SolutionStore

if TYPE_CHECKING:
    import torch

    from ..calibration.quality import Quality


def judged(
    opened: Source,
    asked: Plan,
    found: Plan,
    batches: Sequence[dict[str, torch.Tensor]],
    separate: bool,
    store: SolutionStore,
    listener: Listener,
    device: str | None,
) -> tuple[Quality, Plan]:
    """Measure what a conversion cost; where mean-pooling costs less, and no method was asked for, take that.

    Args:
        opened: the original model.
        asked: the plan as it was asked for.
        found: the plan with the methods that were chosen.
        batches, separate: text to measure on (see ``calibration.quality.set_apart``).
        store: has the solutions, and keeps them: a run that is resumed compares the same.
        listener: told of the outcome.
        device: where the model runs.

    Raises:
        RegroupError: the converted model's predictions are not finite, and its methods were asked for by name.

    Returns:
        What was measured, and the plan to write: ``found``, or one that mean-pools every layer that changes.
    """
    from ..calibration.quality import measure_quality
    from ..devices import device_named

    checkpoint, layout = opened.checkpoint, opened.layout
    with listener.stage("measuring the quality", layout.layers[-1].index + 1, "layers") as count:
        quality = measure_quality(
            checkpoint,
            layout,
            found,
            batches,
            store.load,
            separate=separate,
            device=device_named(device),
            progress=count,
        )
    changing = [want for want in asked.layers if want.changes]
    free = all(want.key_method == want.value_method == "auto" for want in changing)
    pooled = quality.worse_than_pooling and free
    if not pooled and not math.isfinite(quality.kl):
        raise RegroupError(
            "the predictions of a converted model are not finite numbers",
            file=opened.folder,
            got="NaN or infinity on held-out text",
            remedy="leave the method open, or pass --method mean",
        )
    listener.judged(quality, pooled=pooled)
    if not pooled:
        return quality, found
    names = {want.name for want in changing}
    layers = (
        replace(want, key_method="mean", value_method="mean") if want.name in names else want for want in found.layers
    )
    return quality, replace(found, layers=tuple(layers))
