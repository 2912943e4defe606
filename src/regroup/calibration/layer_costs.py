"""Which layers ruin a conversion: found by converting the model layer by layer, and judged by converting without them.

The error of a layer does not tell, since a model may bear a large one in one layer and a small one in another hardly
at all. The loss with the layers up to one converted, and all after it as they were, tells more; but later layers make
up for earlier ones. So the few layers that add most are spared in turn, and the conversion is repeated on less text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from ..checkpoint import Checkpoint
from ..layout.types import AttentionLayer, Layout
from ..plans import Plan, token_bytes
from ..processes import SINGLE_PROCESS, ProcessGroup
from ..safe_text import command
from ..solver.solve import LayerSolution
from ..solver.store import SolutionStore
from .calibrate import calibrate
from .joint import JointModel, first_tokens, token_count
from .layer_runner import Inputs
from .settings import Settings

# At most so many tokens; and at most this share of what calibration took, which is about three passes over its text.
_TOKENS, _LEAST_TOKENS, _SHARE, _CALIBRATION_PASSES = 2048, 32, 0.15, 3
# A layer is suspected if it adds so many nats per token, this share of the loss, and so many times what the median
# layer adds; it ruins the rest if sparing it gains the first two. Of fewer layers one may well hold most of the loss.
_NATS, _DOMINANT, _TIMES, _FEWEST = 0.05, 0.2, 5.0, 4
# So many of those that add most are spared in turn, each in a conversion on this share of the text.
_SUSPECTS, _LESS_TEXT = 2, 1 / 12


@dataclass(frozen=True)
class LayerCosts:
    """What a converted model loses, and where.

    Attributes:
        kl: KL divergence of the original model's predictions from the converted model's, in nats per token.
        added: what each converted layer adds to it, by name: the divergence of the model that is converted up to this
            layer, less that of the model that is converted up to the one before. Layers that make up for earlier ones
            add less than nothing. Their sum is ``kl``.
        tokens: that these were measured on.
        repeated: the divergence of a conversion on less text; None where no layer is suspected.
        spared: the same with one layer as it was, by name, for the layers that are suspected.
    """

    kl: float
    added: dict[str, float]
    tokens: int
    repeated: float | None = None
    spared: dict[str, float] = field(default_factory=dict)

    @property
    def ruinous(self) -> list[str]:
        """The layers without which much less would be lost, the worst one first."""
        if self.repeated is None:
            return []
        least = max(_NATS, _DOMINANT * self.repeated)
        found = [name for name, kl in self.spared.items() if self.repeated - kl > least]
        return sorted(found, key=lambda name: self.spared[name])

    def to_json(self) -> dict[str, Any]:
        """For the record."""
        found = {"tokens": self.tokens, "kl_nats_per_token": self.kl, "added_kl": self.added}
        if self.repeated is not None:
            found |= {"kl_on_less_text": self.repeated, "kl_on_less_text_without": self.spared}
        return found


def suspects(kl: float, added: Mapping[str, float]) -> list[str]:
    """The layers that add a dominant share of a loss, the worst one first.

    Args:
        kl, added: see ``LayerCosts``.
    """
    if len(added) < _FEWEST:
        return []
    least = max(_NATS, _DOMINANT * kl, _TIMES * median(added.values()))
    return sorted((name for name, value in added.items() if value > least), key=lambda name: -added[name])[:_SUSPECTS]


def affordable_tokens(calibrated: int, layers: int) -> int:
    """How many tokens ``layer_costs`` may use: for each layer it takes half a pass over them on average."""
    return min(_TOKENS, int(_SHARE * _CALIBRATION_PASSES * calibrated * 2 / max(1, layers)))


def layer_costs(
    checkpoint: Checkpoint,
    layout: Layout,
    plan: Plan,
    batches: Sequence[Inputs],
    settings: Settings,
    store: SolutionStore | None,
    *,
    device: str = "cpu",
    progress: Callable[[int], object] | None = None,
    processes: ProcessGroup = SINGLE_PROCESS,
) -> LayerCosts | None:
    """Find out which layers of a converted model its loss comes from.

    Args:
        checkpoint, layout: of the original model.
        plan: that was carried out, with the methods and orders that were chosen.
        batches, settings: of calibration; the last batches were held out.
        store: has the solution of each converted layer. None in processes that only help another.
        device: where layers run.
        progress: called with the number of models just run, of as many as layers were converted.
        processes: those that do this together; all get the same answer.

    Returns:
        None where there are too few layers to compare, or hardly any text is affordable.
    """
    changed = [p for p, w in enumerate(plan.layers) if w.num_key_value_heads != w.original_num_key_value_heads]
    if len(changed) < _FEWEST:
        return None
    held_out = batches[-settings.held_out_batches(len(batches), token_count(batches[:1])) :]
    text = first_tokens(held_out, affordable_tokens(token_count(batches), len(changed)))
    if token_count(text) < _LEAST_TOKENS:
        return None

    def solution(name: str, _: int) -> LayerSolution:
        assert store is not None
        return store.load(name)

    model = JointModel(checkpoint, layout, text, solution, device=device, processes=processes)
    so_far, variants = model.original, {}
    for place in sorted(changed, key=lambda place: layout.layers[place].index):
        want = plan.layers[place]
        so_far = (*so_far[:place], want.num_key_value_heads, *so_far[place + 1 :])
        variants[want.name] = so_far
    found = model.divergences(list(variants.values()), progress=progress)
    del model
    added = {name: kl - before for name, kl, before in zip(variants, found, [0.0, *found], strict=False)}
    costs = LayerCosts(found[-1], added, token_count(text))
    worst = suspects(costs.kl, added)
    if not worst:
        return costs
    fitted = batches[: len(batches) - len(held_out)]
    few = [*fitted[: max(processes.size, round(len(fitted) * _LESS_TEXT))], *held_out[: processes.size]]

    def again(name: str | None) -> float:
        layers = tuple(
            replace(want, num_key_value_heads=want.original_num_key_value_heads, query_order=None)
            if want.name == name
            else want
            for want in plan.layers
        )
        given = replace(plan, layers=layers)
        return calibrate(checkpoint, layout, given, few, None, settings, device=device, processes=processes).kl

    return replace(costs, repeated=again(None), spared={name: again(name) for name in worst})


def warning(costs: LayerCosts, layout: Layout, plan: Plan, source: str) -> str | None:
    """What to say of layers that ruin the rest, with the commands that spare them; None where there is none.

    Args:
        costs, layout, plan: of the conversion.
        source: the original model, as the user named it.
    """
    names = costs.ruinous
    if not names or costs.repeated is None:
        return None
    layers: Mapping[str, AttentionLayer] = {layer.name: layer for layer in layout.layers}
    both = {layer.kind for layer in layout.layers} == {"self", "cross"}
    wants = {want.name: want for want in plan.layers}
    parts = [
        f"{name} costs {costs.repeated - costs.spared[name]:.2f} of the {costs.repeated:.2f} nats per token that a "
        f"conversion on some of the text loses: with its {layers[name].num_key_value_heads} KV heads kept it would "
        f"lose {costs.spared[name]:.2f}"
        for name in names
    ]
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
