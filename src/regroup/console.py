"""Tables and progress bars for results; computes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from rich.table import Table

from .errors import human_bytes
from .inspection import LayerSummary, Summary
from .layout import Layout
from .layout.kv_cache import DTYPE_BYTES, cache_dtype
from .listener import Listener
from .opening import Source
from .plans import LayerPlan, Plan
from .progress import Progress, duration, stage
from .screen import Screen

if TYPE_CHECKING:
    from .calibration.budgeted import Budgeted
    from .calibration.calibrate import Calibrated
    from .calibration.own_time import OwnTextAhead
    from .calibration.quality import Quality
    from .layout.types import AttentionLayer
    from .solver.similarity import LayerSimilarity
    from .writer.estimate import Estimate
    from .writer.preview import Preview

out = Screen()
err = Screen(stderr=True)


def show_summary(
    summary: Summary, kv_heads: Sequence[int], *, context: int, batch: int, encoder_context: int | None
) -> None:
    """What ``regroup inspect`` prints."""
    facts = [summary.family, f"{len(summary.layers)} attention layers with a KV cache"]
    if summary.encoder_layers:
        facts.append(f"{summary.encoder_layers} encoder layers without one, which stay as they are")
    if summary.parameters is not None:
        facts.append(f"{summary.parameters / 1e6:,.1f} M parameters")
    if summary.dtype is not None:
        facts.append(summary.dtype)
    out.label(summary.source, "bold", "", ", ".join(facts))

    table = Table("layers", "attention", "heads", "KV heads", "head_dim", "RoPE dims", "window")
    for layers, example in _runs(summary.layers):
        table.add_row(
            layers,
            example.kind,
            str(example.num_attention_heads),
            str(example.num_key_value_heads),
            str(example.head_dim),
            str(example.rotary_dim or "–"),
            str(example.window or "–"),
        )
    out.print(table)

    where = f"{context:,} tokens × batch {batch}"
    if encoder_context is not None:
        where += f", {encoder_context:,} encoder tokens"
    own, called = cache_dtype(summary.dtype)
    # The dtype that a conversion counts in comes first.
    shown = {own: called} | {
        dtype: name
        for dtype, name in (("BF16", "16-bit"), ("F32", "32-bit"), ("F8", "8-bit"))
        if DTYPE_BYTES[dtype] != DTYPE_BYTES[own]
    }
    cache = Table(
        "KV heads", f"{called}, per token", *(f"{name}, {where}" for name in shown.values()), "relative to current"
    )
    now = summary.kv_bytes(own, context=context, batch=batch, encoder_context=encoder_context)
    for label, variant in [("current", summary), *((str(g), summary.with_kv_heads(g)) for g in kv_heads)]:
        sizes = [
            variant.kv_bytes(dtype, context=context, batch=batch, encoder_context=encoder_context) for dtype in shown
        ]
        cache.add_row(label, human_bytes(variant.kv_bytes(own)), *map(human_bytes, sizes), f"{sizes[0] / now:.3g}")
    out.print(cache)


def show_similarity(layers: Sequence[LayerSimilarity], left_out: int) -> None:
    """The similarity of the KV heads of each layer, and what was not compared and why.

    Args:
        layers: the layers that were compared.
        left_out: number of layers with a single KV head, which were not.
    """
    groups = sorted({g for layer in layers if layer.overall for g in layer.overall.contiguous}, reverse=True)
    table = Table(
        "layer", "keys", "values", "both", "most similar", "their loss", title="share of energy lost by sharing a head"
    )
    for g in groups:
        table.add_column(f"to {g}")
    notes: dict[str, list[str]] = {}
    for layer in layers:
        label = f"{layer.index} {layer.kind}"
        for what, obstacle in (("keys", layer.key_obstacle), ("values", layer.value_obstacle)):
            if obstacle is not None:
                notes.setdefault(f"{what} are not compared: {obstacle}", []).append(label)
        medians = ["–" if part is None else _share(part.median) for part in (layer.key, layer.value, layer.both)]
        best, shares = ["–", "–"], {}
        if layer.overall is not None:
            shares = layer.overall.contiguous
            best = ["{}, {}".format(*layer.overall.most_similar), _share(layer.overall.least)]
        table.add_row(label, *medians, *best, *(_share(shares[g]) if g in shares else "–" for g in groups))
    out.print(table)
    out.print(
        "keys, values, both (their mean): the loss of the median pair of KV heads; 50% is the maximum.",
        "to N: the loss of groups of adjacent heads with N KV heads.",
        "From the weights alone, for maps that queries and outputs absorb. Energy is not loss: see regroup evaluate.",
        sep="\n",
    )
    for note, labels in notes.items():
        where = "every layer" if len(labels) == len(layers) else ", ".join(labels)
        out.label("note:", "yellow", f"{note} ({where}); the other columns are of the rest alone")
    if left_out:
        out.label("note:", "yellow", f"layers skipped, because they have one KV head: {left_out}")


def _share(share: float) -> str:
    """Percent, with two digits that count."""
    return f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def show_plan(plan: Plan, layout: Layout) -> None:
    """A plan, with equal layers in one row."""
    table = Table("layers", "attention", "heads", "KV heads", "to", "keys by", "values by", "order", title="plan")
    rows: dict[tuple[object, ...], list[int]] = {}
    for layer, want in zip(layout.layers, plan.layers, strict=True):
        key = (
            layer.kind,
            want.num_attention_heads,
            want.original_num_key_value_heads,
            want.num_key_value_heads,
            *want.methods,
            _order(plan, want, layer),
        )
        rows.setdefault(key, []).append(layer.index)
    for key, indices in rows.items():
        table.add_row(_ranges(indices), *map(str, key))
    err.print(table)
    if plan.kv_budget is not None:
        if plan.predicted_kl is None:
            err.print(
                f"KV budget {plan.kv_budget}: divided by the energy that the weights lose, which does not predict the "
                "loss; --calibration measures it"
            )
        else:
            less = ", and less after its distillation, which was left out here" if plan.repair == "distill" else ""
            err.print(
                f"KV budget {plan.kv_budget}: expect a KL divergence from the original model of "
                f"{plan.predicted_kl:.3f} nats per token after a conversion by this plan{less}"
            )
    if plan.tensor_parallel > 1:
        for count, number in Counter(layer.num_key_value_heads for layer in plan.layers).items():
            if count < plan.tensor_parallel:
                err.label(
                    "note:",
                    "yellow",
                    f"{number} layers have {count} KV heads for {plan.tensor_parallel} devices: "
                    "each is copied to several devices, so this saves no memory over one per device (section 2.2)",
                )


def _order(plan: Plan, want: LayerPlan, layer: AttentionLayer) -> str:
    """How the query heads of a layer are ordered; what a conversion is to find is by text or by weights."""
    if not want.changes:
        return "–"
    if want.query_order is not None:
        return "searched"
    if plan.grouping != "search" or layer.fixed_order is not None or want.num_key_value_heads == 1:
        return "in order"
    return "by text" if plan.calibration is not None and layer.order_group is None else "by weights"


def show_preview(ahead: Preview) -> None:
    """What a conversion writes."""
    err.print(
        f"weights {human_bytes(ahead.bytes_before)} → {human_bytes(ahead.bytes_after)} in {len(ahead.shards)} "
        f"file{'s' if len(ahead.shards) > 1 else ''}, "
        f"{len(ahead.changed)} tensor{'s' if len(ahead.changed) != 1 else ''} rewritten; "
        f"KV cache {human_bytes(ahead.kv_bytes_before)} → {human_bytes(ahead.kv_bytes_after)} per token in "
        f"{ahead.kv_dtype}; "
        + ("loads with stock transformers" if ahead.stock else "loads with trust_remote_code=True or regroup.load")
    )


def show_estimate(ahead: Estimate, *, calibrated: bool) -> None:
    """The estimated cost of a conversion, without calibration."""
    err.print("dry run: nothing was written")
    err.print(
        f"disk: {human_bytes(ahead.bytes_read)} to read, {human_bytes(ahead.bytes_written)} to write, "
        f"{human_bytes(ahead.bytes_free)} free in {ahead.folder}"
    )
    least, most = ahead.seconds
    parts = f"{duration(ahead.copy_seconds)} to copy at {human_bytes(ahead.copy_rate)}/s"
    if ahead.pool_seconds:
        parts += f", {duration(ahead.pool_seconds)} to read and pool the tensors that change"
    if ahead.solve_seconds:
        parts += f", {duration(ahead.solve_seconds)} to solve layers"
    err.print(
        f"time: {duration(least)} to {duration(most)} ({parts}; from {human_bytes(ahead.probed)} copied and flushed, "
        "and one tensor or layer computed, just now)" + (", after calibration" if calibrated else "")
    )


def show_own_text(ahead: OwnTextAhead) -> None:
    """What text of the model's own will take, and what it costs to do without."""
    written = (
        f"the original model writes {ahead.tokens:,} tokens of text to calibrate on, in about "
        f"{duration(ahead.sampling_seconds)}, and calibration takes"
        if ahead.sampling_seconds
        else "calibration on text that the original model wrote takes"
    )
    err.print(
        f"{written} about {duration(ahead.calibration_seconds)} (from products timed just now). --calibration none "
        "skips this and uses the weights alone, at a cost in quality: SmolLM2-135M from 3 KV heads to 1 lost 7.2 "
        "nats per token that way, and 1.1 on its own text"
    )


def show_outcomes(solved: Calibrated) -> None:
    """What calibration chose for each layer, and the remaining error."""
    table = Table("attention layer", "keys by", "values by", "order", "relative error", title="calibration")
    orders = {layer.name: layer.query_order for layer in solved.plan.layers}
    for outcome in solved.outcomes:
        stand = "searched" if orders[outcome.name] else "in order"
        table.add_row(outcome.name, outcome.key_method, outcome.value_method, stand, f"{outcome.error:.1%}")
    err.print(table)
    expected = "" if solved.plan.predicted_kl is None else f" (predicted by the plan: {solved.plan.predicted_kl:.3f})"
    err.print(
        f"KL divergence from the original model on held-out calibration text: {solved.kl:.3f} nats per token{expected}"
    )


def show_quality(quality: Quality, *, pooled: bool) -> None:
    """What a conversion cost on text that was not fitted."""
    spread = "" if quality.kl_error is None else f" ± {quality.kl_error:.3f}"
    apart = "that nothing was fitted or chosen on" if quality.separate else "that methods were chosen on"
    err.print(
        f"on {quality.tokens:,} tokens {apart}: loss {quality.loss:.3f} before, {quality.converted_loss:.3f} after; KL "
        f"divergence from the original model {quality.kl:.3f}{spread} nats per token (mean-pooled heads: "
        f"{quality.pooled_kl:.3f})"
    )
    if pooled:
        err.label("warning:", "yellow", "mean-pooling loses less on that text, so the heads are mean-pooled")
    elif quality.worse_than_pooling:
        err.label("warning:", "yellow", "mean-pooling (--method mean) loses less on that text than what was asked for")


def show_choice(found: Budgeted) -> None:
    """How a plan was found for a KV budget."""
    refined = found.refined
    err.print(
        f"compared {refined.trials} plans by the KL divergence of the whole model on held-out text: {refined.loss:.3f} "
        f"nats per token, where the sum over single layers is {found.summed:.3f} and the plan of the least sum has "
        f"{refined.start_loss:.3f}"
    )
    rest = "no exchange of KV heads between two layers lowers it" if refined.settled else "not all exchanges were tried"
    err.print(f"on other held-out text: {found.kl:.3f} ({found.start_kl:.3f} for the plan of the least sum); {rest}")


class ConsoleListener(Listener):
    """Shows the progress of a conversion or an export."""

    def __init__(self, title: str = "converting") -> None:
        self.title = title

    def planned(self, source: Source, plan: Plan, ahead: Preview) -> None:
        show_plan(plan, source.layout)
        show_preview(ahead)
        if source.ignores_code:
            err.label("note:", "yellow", "the source has code of its own, which is neither run nor copied")

    def notice(self, text: str) -> None:
        err.label("note:", "yellow", text)

    def own_text(self, ahead: OwnTextAhead) -> None:
        show_own_text(ahead)

    def writing_text(self, tokens: int) -> AbstractContextManager[Progress]:
        return stage("writing calibration text", tokens, unit="tokens")

    def searching(self, layers: int) -> AbstractContextManager[Progress]:
        return stage("comparing heads", layers, unit="layers")

    def calibrating(self, layers: int) -> AbstractContextManager[Progress]:
        return stage("calibrating", layers, unit="layers")

    def calibrated(self, solved: Calibrated) -> None:
        show_outcomes(solved)

    def judged(self, quality: Quality, *, pooled: bool) -> None:
        show_quality(quality, pooled=pooled)

    def chosen(self, found: Budgeted) -> None:
        show_choice(found)

    def writing(self, nbytes: int) -> AbstractContextManager[Progress]:
        return stage(self.title, nbytes, unit="bytes")

    def comparison_ahead(self, nbytes: int) -> None:
        err.print(
            f"source and result are compared afterwards, one at a time, using about {human_bytes(nbytes)} of memory"
        )

    def stage(self, title: str, total: int | None = None, unit: str = "") -> AbstractContextManager[Progress]:
        return stage(title, total, unit=unit)

    def comparing(self) -> AbstractContextManager[Progress]:
        return stage("comparing", 2, unit="models")


def _runs(layers: Sequence[LayerSummary]) -> list[tuple[str, LayerSummary]]:
    """Layers that differ only in their names share a row."""
    rows: dict[tuple[object, ...], list[int]] = {}
    examples: dict[tuple[object, ...], LayerSummary] = {}
    seen: Counter[str] = Counter()
    for layer in layers:
        key = (
            layer.kind,
            layer.num_attention_heads,
            layer.num_key_value_heads,
            layer.head_dim,
            layer.window,
            layer.rotary_dim,
        )
        rows.setdefault(key, []).append(seen[layer.kind])
        examples.setdefault(key, layer)
        seen[layer.kind] += 1
    return [(_ranges(indices), examples[key]) for key, indices in rows.items()]


def _ranges(indices: Sequence[int]) -> str:
    """0, 1, 2, 5 to ``"0-2, 5"``."""
    spans: list[list[int]] = []
    for index in indices:
        if spans and index == spans[-1][1] + 1:
            spans[-1][1] = index
        else:
            spans.append([index, index])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)
