"""One attention layer, converted where the child is: candidates are tried, judged on held-out text, and repaired."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache

import torch

from ..checkpoint import Checkpoint
from ..checkpoint.reader import TORCH_DTYPES
from ..errors import RegroupError
from ..layout.types import AttentionLayer
from ..merge import Sharing
from ..models.modeling_regroup import regroup_attention
from ..plan import LayerPlan
from ..processes import ALONE, Team
from .grouping import Groupings, Option
from .heads import HeadWeights, gather, load_into, scatter, share
from .layers import DecoderLayer, LayerStream, Seen
from .repair import DistillSettings, Refit, Regression, distill, refit_output
from .rewrite import rewrites
from .solve import solve_keys, solve_values

KEY_METHODS = ("lowrank", "procrustes")
VALUE_METHODS = ("lowrank", "procrustes")
# One layer's held-out error is not the model's loss: Procrustes has to be better by more than chance to be taken.
_MARGIN = 1.05


@dataclass(frozen=True)
class Settings:
    """How to calibrate.

    Attributes:
        choose: try every method for keys and values, layer by layer; else keep the plan's.
        search: look for heads that belong together, where the plan names no order and the family allows one.
        repair: ``"none"``, ``"output"`` (solve the output projection again) or ``"distill"`` (train the layer's
            attention).
        held_out: share of the batches that is judged on and never fitted,
        held_out_tokens: and how many tokens of them at most, at one batch at least.
        judged_on: tokens to fit candidates on; what is chosen is fitted on all of the text.
        distillation: see there.
        seed: of the search.
    """

    choose: bool = True
    search: bool = True
    repair: str = "output"
    held_out: float = 0.125
    held_out_tokens: int = 16_384
    judged_on: int = 16_384
    distillation: DistillSettings = field(default_factory=DistillSettings)
    seed: int = 0


@dataclass(frozen=True)
class LayerOutcome:
    """What was chosen for a layer, and what it misses of its target on held-out text.

    The target is what the parent's attention gives and what the child's residual stream lacks before it, so that the
    share missed grows with depth.

    Attributes:
        name, key_method, value_method: of the layer.
        error_merged, error: shares of the target's energy that are missed after merging, and after repair.
    """

    name: str
    key_method: str
    value_method: str
    error_merged: float
    error: float


class AttentionWorker:
    """Converts attention layers of one checkpoint.

    Args:
        checkpoint: the parent.
        stream: its decoder layers and this process's share of the text.
        settings: see there.
        team: the processes that share the text. What is fitted and judged on is the same batches as in one process.
    """

    def __init__(self, checkpoint: Checkpoint, stream: LayerStream, settings: Settings, team: Team = ALONE) -> None:
        self.checkpoint, self.stream, self.settings, self.team = checkpoint, stream, settings, team
        count = sum(team.gathered(len(stream.batches)))
        size = team.gathered(max(1, stream.hidden[0].shape[0] * stream.hidden[0].shape[1]))[0]
        kept = max(1, min(round(count * settings.held_out), settings.held_out_tokens // size))
        self.fit, self.held_out = team.own(0, count - kept), team.own(count - kept, count)
        self.judging = team.own(0, min(count - kept, max(1, settings.judged_on // size)))

    def masks(self, batch: int, layer: AttentionLayer) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Which query positions and which memory positions hold text, (B, T) and (B, S); None for all."""
        inputs = self.stream.batches[batch]
        decoder = inputs.get("decoder_attention_mask")
        return decoder, inputs.get("attention_mask") if layer.kind == "cross" else decoder

    def observe(
        self,
        teacher: DecoderLayer,
        layers: Sequence[AttentionLayer],
        hidden: list[torch.Tensor],
        groupings: Sequence[Groupings],
    ) -> tuple[dict[str, list[torch.Tensor]], list[torch.Tensor]]:
        """Run a decoder layer of the parent over all batches, and gather what its attention does.

        Args:
            teacher: the layer.
            layers: its attention layers.
            hidden: hidden states before it, for each batch.
            groupings: of those attention layers that are to be converted.

        Returns:
            For each attention layer what its output projection gave for each batch, and hidden states after the layer.
        """
        first = [grouping for grouping in groupings if grouping.looks_first]
        for batch in self.judging if first else ():
            # Only what enters the attention is looked at; the pass ends at the last output projection.
            seen, _ = teacher.observe(batch, hidden[batch], layers, whole=False)
            for grouping in first:
                grouping.look(seen[grouping.layer.name], *self.masks(batch, grouping.layer))
        for grouping in groupings:
            grouping.settle(self.team)
        outputs: dict[str, list[torch.Tensor]] = {layer.name: [] for layer in layers}
        after: list[torch.Tensor] = []
        for batch, states in enumerate(hidden):
            seen, result = teacher.observe(batch, states, layers, whole=True)
            assert result is not None
            if not result.isfinite().all():
                raise RegroupError(
                    "the parent's hidden states are not finite numbers",
                    file=self.checkpoint.folder,
                    layer=f"decoder layer {teacher.index}",
                    got="NaN or infinity after it",
                    remedy="download the checkpoint again, or look for the training step that broke it",
                )
            after.append(result.cpu())
            for layer in layers:
                outputs[layer.name].append(seen[layer.name].output.cpu())
            for grouping in groupings if batch in self.fit else ():
                grouping.add(seen[grouping.layer.name], *self.masks(batch, grouping.layer))
        for grouping in groupings:
            grouping.merge(self.team)
        return outputs, after

    def convert(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        weights: HeadWeights,
        options: Sequence[Option],
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
    ) -> tuple[LayerPlan, LayerOutcome]:
        """Convert the last of ``layers`` in the pupil, in place.

        Args:
            pupil: a copy of the decoder layer, its earlier attention layers converted already.
            layers: attention layers of the decoder layer up to the one to convert.
            weights: of the parent's attention.
            options: ways to group the heads, of which the best stays.
            targets: for each batch what the output projection should give, (B, T, hidden).
            child: hidden states before the decoder layer, for each batch.

        Returns:
            What was chosen, and how good it is on held-out text.
        """
        layer = layers[-1]
        stock = pupil.attention(layer)
        tried: dict[tuple[int, str, str], float] = {}

        @cache
        def keys_by(number: int, method: str) -> list[Sharing]:
            want, moments = options[number].want, options[number].moments
            return solve_keys(method, layer, moments, want.order, want.num_key_value_heads)

        @cache
        def values_by(number: int, method: str) -> list[Sharing]:
            want, moments = options[number].want, options[number].moments
            return solve_values(method, layer, weights, moments, want.order, want.num_key_value_heads)

        def install(number: int, key: str, value: str) -> HeadWeights:
            want = options[number].want
            made = self.team.led(lambda: share(weights, want.order, keys_by(number, key), values_by(number, value)))
            self._install(pupil, layer, stock, want, made)
            return made

        def attempt(number: int, key: str, value: str) -> float:
            if (number, key, value) not in tried:
                output = install(number, key, value).output.flatten(0, 1)
                tried[number, key, value] = self._refit(pupil, layers, output, targets, child, self.judging)[0].error
            return tried[number, key, value]

        best = (0, options[0].want.key_method, options[0].want.value_method)
        if self.settings.choose:
            keys = KEY_METHODS if layer.key_obstacle is None else ("mean",)
            values = VALUE_METHODS if layer.value_obstacle is None else ("mean",)
            for number in range(len(options)):
                # Keys first, with the values' likely choice; then values. All pairs would cost as many passes again.
                key = min(keys, key=lambda name, at=number: attempt(at, name, values[0]) * _handicap(name))
                for value in values:
                    attempt(number, key, value)
            best = min(tried, key=lambda candidate: tried[candidate] * _handicap(*candidate[1:]))
        elif len(options) > 1:
            best = min(((number, *best[1:]) for number in range(len(options))), key=lambda one: attempt(*one))
        number, key, value = best
        want = replace(options[number].want, key_method=key, value_method=value)
        made = install(*best)
        refit, attended = self._refit(pupil, layers, made.output.flatten(0, 1), targets, child, self.fit)
        merged = refit.error_before
        self._install(pupil, layer, stock, want, replace(made, output=refit.weights.view_as(made.output)))
        if self.settings.repair == "distill":
            self._distill(pupil, layers, targets, child, attended)
            slot = layer.output.weight
            weight = pupil.attention(layer).get_parameter(slot.tensor.removeprefix(layer.name + "."))
            trained = gather(slot, lambda _: weight).flatten(0, 1)
            refit, _ = self._refit(pupil, layers, trained, targets, child, self.fit)
            heads = refit.weights.view_as(made.output)
            load_into(pupil.attention(layer), layer, {slot.tensor: scatter([(slot, heads)])})
        return want, LayerOutcome(layer.name, key, value, merged, refit.error)

    def _install(
        self, pupil: DecoderLayer, layer: AttentionLayer, stock: torch.nn.Module, want: LayerPlan, made: HeadWeights
    ) -> None:
        """Put grouped attention with these heads into the pupil, rounded as it will be stored."""
        module = copy.deepcopy(stock)
        regroup_attention(module, want.num_key_value_heads, layer.name)
        tensors = self.checkpoint.tensors
        moves, _ = rewrites(layer, want, tensors, std=0.0, seed=0)
        made_tensors = made.tensors(layer.with_kv_heads(want.num_key_value_heads))
        extras = {name: how.run(name, self.checkpoint.read) for name, how in moves.items() if name not in made_tensors}
        rounded = {
            name: value.to(TORCH_DTYPES[tensors[name].dtype]).float() for name, value in (extras | made_tensors).items()
        }
        load_into(module, layer, rounded)
        parent_path, _, name = self.stream.inside(layer).rpartition(".")
        setattr(pupil.module.get_submodule(parent_path), name, module)

    def _refit(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        output: torch.Tensor,
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
        fit: Sequence[int],
    ) -> tuple[Refit, torch.Tensor | None]:
        """Held-out error of the heads in the pupil, with the output projection solved again unless repair is off.

        Returns:
            The projection (F, hidden) with errors, and the second moment of what it is given (F, F) where text was
            fitted.
        """
        bias = self._output_bias(pupil, layers[-1])
        own = {True: Regression(), False: Regression()}
        repaired = self.settings.repair != "none"
        for batch in (*(fit if repaired else ()), *self.held_out):
            seen, target = self._look(pupil, layers, batch, targets, child)
            mixed = self._rows(seen.mixed, batch, layers[-1])
            own[batch in self.fit].add(mixed, target if bias is None else target - bias)
        held_out = own[False].merged(self.team)
        if not repaired:
            error = self.team.led(lambda: held_out.error(output))
            return Refit(output, error, error), None
        fitted = own[True].merged(self.team)
        best = self.team.led(lambda: refit_output(fitted, held_out, output))
        return replace(best, weights=best.weights.to(output.dtype)), fitted.gram

    def _distill(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
        attended: torch.Tensor | None,
    ) -> None:
        """Train the installed attention against the targets, in place."""
        layer = layers[-1]
        energy = sum(
            float(self._look(pupil, layers, batch, targets, child)[1].square().sum()) for batch in self.held_out
        )
        power = self.team.total(energy) / self.team.total(len(self.held_out))

        def loss_of(batch: int) -> torch.Tensor:
            seen, target = self._look(pupil, layers, batch, targets, child)
            return (self._rows(seen.output, batch, layer) - target).square().sum() / power

        names = [name.removeprefix(layer.name + ".") for name in projection_tensors(layer)]
        inputs = self._input_moments(pupil, layers, targets, child, attended)
        with torch.enable_grad():
            distill(
                pupil.attention(layer),
                names,
                loss_of,
                self.fit,
                self.held_out,
                self.settings.distillation,
                inputs,
                self.team,
            )

    def _input_moments(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
        attended: torch.Tensor | None,
    ) -> dict[str, tuple[torch.Tensor, int]]:
        """For each projection's weight: the second moment of what it multiplies, and the axis that lies along."""
        layer = layers[-1]
        sums: dict[str, torch.Tensor] = {}
        for batch in self.judging:
            seen, _ = self._look(pupil, layers, batch, targets, child)
            for name, states in (("query", seen.query_input), ("memory", seen.memory)):
                flat = states.flatten(0, 1)
                gram = (flat.T @ flat).double()
                sums[name] = sums[name] + gram if name in sums else gram
        sums = self.team.added(sums)
        if attended is not None:
            sums["output"] = attended
        found = {}
        for part, projection in layer.projections().items():
            slot = projection.weight
            of = {"query": "query", "output": "output"}.get(part, "memory")
            if of in sums and "{head}" not in slot.tensor:
                # Heads lie along the axis that is not the inputs', except in the output projection.
                axis = slot.axis if part == "output" else 1 - slot.axis
                found[slot.tensor.removeprefix(layer.name + ".")] = (sums[of], axis)
        return found

    def _look(
        self,
        pupil: DecoderLayer,
        layers: Sequence[AttentionLayer],
        batch: int,
        targets: list[torch.Tensor],
        child: list[torch.Tensor],
    ) -> tuple[Seen, torch.Tensor]:
        """What the last attention does on a batch, and its target where there is text, (rows, hidden)."""
        seen, _ = pupil.observe(batch, child[batch], layers, whole=False)
        return seen[layers[-1].name], self._rows(targets[batch].to(self.stream.device), batch, layers[-1])

    def _rows(self, states: torch.Tensor, batch: int, layer: AttentionLayer) -> torch.Tensor:
        """Positions that hold text: (B, T, F) to (rows, F)."""
        rows, _ = self.masks(batch, layer)
        flat = states.flatten(0, 1)
        return flat if rows is None else flat[rows.flatten().bool().to(flat.device)]

    def _output_bias(self, pupil: DecoderLayer, layer: AttentionLayer) -> torch.Tensor | None:
        name = layer.output.weight.tensor.removeprefix(layer.name + ".").removesuffix(".weight")
        return getattr(pupil.attention(layer).get_submodule(name), "bias", None)


def _handicap(*methods: str) -> float:
    return _MARGIN ** sum(method == "procrustes" for method in methods)


def projection_tensors(layer: AttentionLayer) -> list[str]:
    """Names of the weights and biases of the four projections."""
    names = {slot.tensor for p in layer.projections().values() for slot in (p.weight, p.bias) if slot is not None}
    return sorted(names)
