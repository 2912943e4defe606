"""What each layer of a converted model costs: its layers are restored one at a time, on a little held-out text.

The error of a layer does not tell, since a model may bear a large one in one layer and a small one in another hardly
at all. Restoring it in the whole model does. Later layers made up for it as far as they could, so that what is gained
is, if anything, more when the conversion is repeated without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from ..checkpoint import Checkpoint
from ..layout.types import AttentionLayer, Layout
from ..plans import Plan, token_bytes
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..safe_text import command
from ..solver.solve import LayerSolution
from ..solver.store import SolutionStore
from .joint import JointModel, first_tokens, token_count
from .layer_runner import Inputs

# At most so many tokens; and at most this share of what calibration took, which is about three passes over its text.
_TOKENS, _SHARE, _CALIBRATION_PASSES = 2048, 0.25, 3
# A layer ruins the rest if restoring it gains so many nats per token, this share of the loss, and so many times what
# the median layer gains.
_NATS, _DOMINANT, _TIMES = 0.05, 0.2, 5.0
# Of fewer layers one may well hold most of the loss.
_FEWEST = 4


@dataclass(frozen=True)
class LayerCosts:
    """What a converted model loses, and what it would lose with one of its layers as it was.

    Attributes:
        kl: KL divergence of the original model's predictions from the converted model's, in nats per token.
        restored: the same with one attention layer restored, by its name.
        tokens: that this was measured on.
    """

    kl: float
    restored: dict[str, float]
    tokens: int

    @property
    def ruinous(self) -> list[str]:
        """The layers that hold a dominant share of the loss, the worst one first."""
        gains = {name: self.kl - kl for name, kl in self.restored.items()}
        least = max(_NATS, _DOMINANT * self.kl, _TIMES * median(gains.values())) if gains else 0.0
        return sorted((name for name, gain in gains.items() if gain > least), key=lambda name: -gains[name])

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        return {"tokens": self.tokens, "kl_nats_per_token": self.kl, "kl_with_layer_restored": self.restored}


def affordable_tokens(calibrated: int, layers: int) -> int:
    """How many tokens ``layer_costs`` may use: each layer that is restored takes half a pass on average."""
    return min(_TOKENS, int(_SHARE * _CALIBRATION_PASSES * calibrated * 2 / max(1, layers)))


def layer_costs(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    held_out: Sequence[Inputs],
    tokens: int,
    store: SolutionStore | None,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> LayerCosts | None:
    """Restore each converted layer in turn, and see what the model's predictions gain.

    Args:
        checkpoint, layout: of the original model.
        plan: that was carried out.
        held_out: model inputs that were not fitted on.
        tokens: how many to use at most.
        store: has the solution of each converted layer. None in processes that only help another.
        device: where layers run.
        progress: called with the number of models just run.
        processes: those that do this together; all get the same answer.

    Returns:
        None where there is nothing to compare, or not one window of text that is affordable.
    """
    changed = [p for p, w in enumerate(plan.layers) if w.num_key_value_heads != w.original_num_key_value_heads]
    batches = first_tokens(held_out, tokens)
    if len(changed) < _FEWEST or token_count(batches) > tokens:
        return None
    converted = tuple(want.num_key_value_heads for want in plan.layers)

    def solution(name: str, _: int) -> LayerSolution:
        assert store is not None
        return store.load(name)

    model = JointModel(checkpoint, layout, batches, solution, device=device, processes=processes)
    variants = {
        plan.layers[place].name: (*converted[:place], model.original[place], *converted[place + 1 :])
        for place in changed
    }
    found = model.divergences([converted, *variants.values()], progress=progress)
    return LayerCosts(found[0], dict(zip(variants, found[1:], strict=True)), token_count(batches))


def warning(costs: LayerCosts, layout: Layout, plan: Plan, source: str) -> str | None:
    """What to say of layers that ruin the rest, with the commands that spare them; None where there is none.

    Args:
        costs, layout, plan: of the conversion.
        source: the original model, as the user named it.
    """
    names = costs.ruinous
    if not names:
        return None
    layers: Mapping[str, AttentionLayer] = {layer.name: layer for layer in layout.layers}
    both = {layer.kind for layer in layout.layers} == {"self", "cross"}
    wants = {want.name: want for want in plan.layers}
    usual = median(costs.kl - kl for kl in costs.restored.values())
    parts = []
    for name in names:
        parts.append(
            f"{name} alone costs {costs.kl - costs.restored[name]:.2f} of the {costs.kl:.2f} nats per token that the "
            f"conversion loses on held-out text (the median layer {max(usual, 0.0):.2f}); with its "
            f"{layers[name].num_key_value_heads} KV heads kept it would lose {costs.restored[name]:.2f}"
        )
    spared = ",".join(
        f"{layers[n].kind + '.' if both else ''}{layers[n].index}:{layers[n].num_key_value_heads}" for n in names
    )
    heads = {n: layers[n].num_key_value_heads if n in names else want.num_key_value_heads for n, want in wants.items()}
    full = sum(token_bytes(layer, layer.num_key_value_heads) for layer in layout.layers)
    taken = sum(token_bytes(layer, heads[layer.name]) for layer in layout.layers)
    budget = f"{-(-1000 * taken // full) / 10:g}%"
    again = command("plan", source, kv_budget=budget, output="plan.json")
    keep = command("convert", source, "DST", kv_heads=plan.uniform, layers=spared)
    first = f"to keep {'it' if len(names) == 1 else 'them'}, use {keep}; " if plan.uniform is not None else ""
    return f"{'; '.join(parts)}; {first}to have the KV heads of all layers chosen, {again}"
