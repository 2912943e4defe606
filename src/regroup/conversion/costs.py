"""After a conversion on text: which of its layers ruin the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..calibration.settings import Settings
from ..listener import Listener
from ..opening import Source
from ..plans import Plan
from ..processes import ProcessGroup
from ..solver.store import SolutionStore

if TYPE_CHECKING:
    import torch


def layers_compared(
    opened: Source,
    plan: Plan,
    batches: Sequence[dict[str, torch.Tensor]],
    store: SolutionStore,
    settings: Settings,
    listener: Listener,
    device: str | None,
    processes: ProcessGroup,
) -> dict[str, Any]:
    """Find out which layers the loss of a converted model comes from, and tell the user of those that ruin the rest.

    Args:
        opened: the original model.
        plan: that was carried out.
        batches: of calibration, of which the last ones were held out.
        store: has the solutions.
        settings: of calibration.
        listener: told of progress, and of layers that ruin the rest.
        device, processes: see ``convert``.

    Returns:
        For the record; empty where the comparison would have cost too much.
    """
    from ..calibration.layer_costs import layer_costs, warning
    from ..devices import device_named
    from .assist import run_alongside

    narrowed = sum(want.num_key_value_heads != want.original_num_key_value_heads for want in plan.layers)
    given, place = (plan, batches, settings), device_named(processes.device(device))
    processes.call(run_alongside, opened.checkpoint.folder, device, layer_costs, *given, None)
    with listener.stage("looking for layers that ruin the rest", narrowed, "layers") as count:
        costs = layer_costs(
            opened.checkpoint, opened.layout, *given, store, device=place, progress=count, processes=processes
        )
    if costs is None:
        return {}
    said = warning(costs, opened.layout, plan, opened.name)
    if said is not None:
        listener.notice(said)
    return {"layer_costs": costs.to_json()}
