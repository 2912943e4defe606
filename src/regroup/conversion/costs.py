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
    """Restore each layer of a converted model in turn, and tell the user of those that ruin the rest.

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
    from ..calibration.joint import token_count
    from ..calibration.layer_costs import affordable_tokens, layer_costs, warning
    from ..devices import device_named
    from .assist import run_alongside

    narrowed = sum(want.num_key_value_heads != want.original_num_key_value_heads for want in plan.layers)
    held_out = list(batches[-settings.held_out_batches(len(batches), token_count(batches[:1])) :])
    given = plan, held_out, affordable_tokens(token_count(batches), narrowed)
    folder, place = opened.checkpoint.folder, device_named(processes.device(device))
    processes.call(run_alongside, folder, device, layer_costs, *given, None)
    with listener.stage("restoring each layer in turn", narrowed + 1, "models") as count:
        costs = layer_costs(
            opened.checkpoint, opened.layout, *given, store, device=place, progress=count, processes=processes
        )
    if costs is None:
        return {}
    said = warning(costs, opened.layout, plan, opened.name)
    if said is not None:
        listener.notice(said)
    return {"layer_costs": costs.to_json()}
