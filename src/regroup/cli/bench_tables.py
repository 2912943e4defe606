"""How benchmarks look in a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..errors import human_bytes
from ..screen import Screen

if TYPE_CHECKING:
    from ..bench.attention import Shape
    from ..bench.build import Model
    from ..bench.work import Roofs, Work


def show_work(screen: Screen, source: str, models: Sequence[Model], work: Work) -> None:
    """What will be decoded, and what each step reads and computes: arithmetic alone."""
    from ..bench.work import cache_bytes, step_costs

    first = models[0]
    what = f"{work.new} tokens after {'an encoded text' if first.is_encoder_decoder else 'a prompt'} of {work.prompt}"
    screen.label(source, "bold", f": {what}, batch {work.batch}, {work.dtype}, {work.device}", gap="")
    if first.layers < first.full_layers:
        screen.label(
            "note:",
            "yellow",
            f"{first.layers} of the model's {first.full_layers} layers; every figure is of those, and nothing is "
            "extrapolated to the whole",
        )
    if first.is_encoder_decoder:
        screen.label("note:", "yellow", "the encoder is not run: the first token is timed without it")
    random = [str(model.kv_heads) for model in models if model.folder is None]
    if random:
        screen.print(f"weights are random for KV heads {', '.join(random)}")
    table = Table(
        "KV heads",
        "parameters",
        "weights read",
        "KV read",
        "FLOPs",
        "KV cache",
        title=f"one step, computed, in {work.dtype}",
    )
    for model in models:
        weights, attention = step_costs(model, work)
        table.add_row(
            _heads(model.kv_heads),
            f"{model.parameters / 1e6:,.1f} M",
            human_bytes(weights.nbytes),
            human_bytes(attention.nbytes),
            f"{(weights.flops + attention.flops) / 1e9:.3g} G",
            human_bytes(cache_bytes(model, work)),
        )
    screen.print(table)
    if work.batch > 1:
        screen.print(f"a step generates {work.batch} tokens, one per sequence")


def show_ceiling(screen: Screen, models: Sequence[Model], work: Work, roofs: Roofs) -> None:
    """The measured rates, and the least time of a step."""
    ceilings = [roofs.ceiling(model) for model in models]
    rows = f"{work.batch} row{'' if work.batch == 1 else 's'}"
    screen.print(
        f"this machine reads {roofs.bandwidth.median / 1e9:.1f} GB/s (at best {roofs.bandwidth.best / 1e9:.1f}) and "
        f"multiplies {rows} by a matrix at {ceilings[0].weights_rate / 1e9:.0f} GFLOP/s ({work.dtype})"
    )
    table = Table("KV heads", "weights, ms", "attention, ms", "floor, ms", "tokens/s at most", title="the ceiling")
    for model, ceiling in zip(models, ceilings, strict=True):
        weights = ceiling.weights.floor(ceiling.bandwidth, ceiling.weights_rate)
        table.add_row(
            _heads(model.kv_heads),
            _ms(1e3 * weights),
            _ms(1e3 * (ceiling.seconds - weights)),
            _ms(1e3 * ceiling.seconds),
            f"{work.batch / ceiling.seconds:.4g}",
        )
    screen.print(table)


def expected_seconds(models: Sequence[Model], work: Work, roofs: Roofs, paths: int) -> float:
    """A rough guess: prompts at the rate of a large product, steps at twice their floor, and building."""
    rate = roofs.product(max(128, work.batch), models[0].hidden).median
    total = 0.0
    for model in models:
        tokens = 1 if model.is_encoder_decoder else work.prompt
        prompt = 2 * model.weights.multiplied * work.batch * tokens / rate
        step = 2 * roofs.ceiling(model).seconds
        total += paths * work.repeats * (prompt + work.new * step) + 5 * step + model.parameters / 2e8
    return total + 5


def show_model(screen: Screen, found: dict[str, Any], paths: Sequence[str]) -> None:
    """One model, as soon as it was measured."""
    for path in paths:
        timing = found[path]
        token = timing["token_ms"]
        cache = "" if timing["cache_bytes"] is None else f", cache {human_bytes(timing['cache_bytes'])}"
        screen.print(
            f"KV heads {_heads(found['kv_heads'])}, {path}: first token {_ms(timing['first_token_ms'])} ms, then "
            f"{_ms(token['p50'])} ms per step ({_ms(token['p20'])} to {_ms(token['p80'])}), "
            f"{timing['tokens_per_second']:.4g} tokens/s, {timing['fraction_of_the_ceiling']:.0%} of the ceiling{cache}"
        )
        _warn_of_others(screen, timing["other_processes_share_of_cpu"])


def show_comparison(screen: Screen, record: dict[str, Any], paths: Sequence[str]) -> None:
    """All models together, with multi-head attention if it was measured."""
    models = record["results"]["models"]
    many = len(paths) > 1
    columns = ["KV heads", *(["path"] if many else []), "first", "20%", "median", "80%", "tokens/s", "cache"]
    table = Table(*columns, "ceiling", "MHA", "limit", title="milliseconds for the first token and for a step")
    for found in models:
        for path in paths:
            timing = found[path]
            cache = timing["cache_bytes"]
            table.add_row(
                _heads(found["kv_heads"]),
                *([path] if many else []),
                _ms(timing["first_token_ms"]),
                *(_ms(timing["token_ms"][name]) for name in ("p20", "p50", "p80")),
                f"{timing['tokens_per_second']:.4g}",
                "–" if cache is None else human_bytes(cache),
                f"{timing['fraction_of_the_ceiling']:.0%}",
                _times(timing.get("speedup_over_mha")),
                _times(found.get("floor_speedup_over_mha")),
            )
    screen.print(table)
    if any("floor_speedup_over_mha" in found for found in models):
        screen.print(
            "ceiling: share of it that is reached. MHA: speed-up over it; limit: the highest possible speed-up"
        )


def show_shapes(screen: Screen, shapes: Sequence[Shape]) -> None:
    """What attention reads and computes in each shape."""
    table = Table("dtype", "batch", "context", "KV heads", "KV read", "FLOPs", title="one step of one layer, computed")
    for shape in shapes:
        cost = shape.cost
        table.add_row(
            shape.dtype,
            str(shape.batch),
            f"{shape.context:,}",
            str(shape.kv_heads),
            human_bytes(cost.nbytes),
            f"{cost.flops / 1e9:.3g} G",
        )
    screen.print(table)


def show_shape(screen: Screen, found: dict[str, Any]) -> None:
    """One shape, as soon as it was measured."""
    shape = f"{found['dtype']}, batch {found['batch']}, context {found['context']:,}, KV heads {found['kv_heads']}"
    if "left_out" in found:
        screen.print(f"{shape}: skipped, {found['left_out']}")
        return
    table = Table(
        "implementation",
        "20%, ms",
        "median, ms",
        "80%, ms",
        "of the floor",
        title=f"{shape}: floor {_ms(found['floor_ms'])} ms",
    )
    for name, way in sorted(found["ways"].items(), key=lambda item: item[1].get("ms", {"p50": 1e9})["p50"]):
        if "not_run" in way:
            continue
        taken = f" ({found['auto_takes']})" if name == "regroup" else ""
        median = way["ms"]["p50"]
        table.add_row(
            name + taken, *(_ms(way["ms"][q]) for q in ("p20", "p50", "p80")), f"{found['floor_ms'] / median:.0%}"
        )
    screen.print(table)
    for name, way in found["ways"].items():
        if "not_run" in way:
            screen.print(f"not run: {name}: {way['not_run']}")
    _warn_of_others(screen, found["other_processes_share_of_cpu"])


def _warn_of_others(screen: Screen, share: float | None) -> None:
    if share is not None and share > 0.05:
        screen.label(
            "note:",
            "yellow",
            f"other processes kept {share:.0%} of the processors busy meanwhile: these times say little",
        )


def _heads(count: int | None) -> str:
    return "by layer" if count is None else str(count)


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"
