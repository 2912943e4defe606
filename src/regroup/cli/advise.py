"""``regroup advise``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegroupError
from ..extras import require
from ..safe_text import command
from .options import AllowPickle, Calibration, Revision, check_file, with_option_groups


@with_option_groups
def advise(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, a hub id, or a config.json.")],
    *,
    hardware: Annotated[
        str, typer.Option(help="Hardware: h100, a100-80gb, l4, …, or this: measure the current machine.")
    ],
    context: Annotated[
        int, typer.Option(min=2, max=10**9, help="Tokens per sequence; for encoder-decoders, of the input.")
    ],
    batch: Annotated[int, typer.Option(min=1, max=10**9, help="Number of sequences at once.")],
    new: Annotated[
        int, typer.Option(min=2, max=10**9, help="Number of tokens that an encoder-decoder generates.")
    ] = 256,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of weights and cache: float32, bfloat16 or float16. [default: bfloat16; with --hardware "
            "this, the faster of bfloat16 and float32]"
        ),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Number of tensor-parallel devices.")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=0, help="Memory of a device to use, in GB. [default: 90% of the hardware's]")
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Maximum loss above the original model, in nats per token; recommends the fastest model within it.",
        ),
    ] = None,
    max_time: Annotated[float | None, typer.Option(min=0, help="Maximum time per token, in milliseconds.")] = None,
    uptrain_tokens: Annotated[
        str | None, typer.Option(help="Number of tokens of distillation planned afterwards, such as 100M.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="Record of `regroup bench decode` on this hardware; may be repeated.")
    ] = None,
    calibration: Calibration,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the recommended plan to this file.")
    ] = None,
    record: Annotated[Path | None, typer.Option(help="Write the JSON record to this file.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Plot time against loss to this PNG.")] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """Recommend a number of KV heads, from the memory, time and loss that each is predicted to have.

    Without --max-loss, recommends the knee of cache size against loss.
    """
    from ..api import advise as run
    from ..console import ConsoleListener, err, out
    from ..record import write_record, write_whole
    from ..uptraining.budget import parse_count

    if memory is not None and not math.isfinite(memory):
        raise RegroupError("--memory is not a number of GB", expected="such as 72", got=f"--memory {memory}")
    taken: dict[str, Path | None] = {f"the bench record {path}": path for path in bench or ()}
    for what, file in (("the plan", output), ("the record", record), ("the figure", figure)):
        if file is not None:
            check_file(file, taken)
            taken[what] = file
    if figure is not None:
        require("report", "matplotlib")
    text = calibration.text()
    advice = run(
        source,
        hardware=hardware,
        context=context,
        batch=batch,
        new=new,
        dtype=dtype,
        tensor_parallel=tensor_parallel,
        memory_bytes=None if memory is None else int(memory * 1e9),
        max_loss=max_loss,
        max_seconds=None if max_time is None else max_time / 1e3,
        uptrain_tokens=None if uptrain_tokens is None else parse_count(uptrain_tokens),
        calibration=text,
        repair=calibration.repair or "output",
        device=calibration.device,
        bench=bench or (),
        revision=revision,
        allow_pickle=allow_pickle,
        listener=ConsoleListener(),
    )
    out.print(_table(advice))
    for line in advice.assumptions:
        out.print(f"- {line}")
    _recommend(out, advice, source, output, calibration.as_options())
    if figure is not None:
        from ..advice.plot import draw

        draw(advice.record, figure)
        err.print(f"wrote {figure}")
    if output is not None and advice.plan is not None:
        write_whole(output, advice.plan.dumps(), "the plan")
        err.print(f"wrote {output}")
    elif output is not None:
        err.print(f"the model needs no conversion, so {output} was not written")
    if record is not None:
        write_record(record, advice.record)
        err.print(f"wrote {record}")


def _table(advice: Any) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ..errors import human_bytes

    first = advice.predictions[0]
    known, after = first.judged is not None, first.loss_after is not None
    measure = "loss" if first.loss is not None else "energy lost"
    columns = ["", "memory", f"cache, {advice.setting.dtype}", "fits", "ms per token"]
    table = Table(*columns, *([measure] if known else []), *(["uptrained"] if after else []))
    for one, on in zip(advice.predictions, advice.front, strict=True):
        cells = [
            ("● " if on and known else "  ") + one.name,
            human_bytes(one.memory_bytes),
            human_bytes(one.cache_bytes),
            f"{one.largest_batch:,}",
            _milliseconds(one.token_seconds),
        ]
        if known:
            cells.append(f"{one.energy:.1%}" if one.loss is None else f"{one.loss:+.3f}")
        if after:
            cells.append(f"{one.loss_after:+.3f}")
        table.add_row(*cells, style="bold" if one is advice.chosen else None)
    words = f"batch {advice.setting.batch:,}; fits: the largest batch; loss in nats per token over the original model"
    table.caption = Text(words + ("\n● Pareto front: nothing is both faster and better" if known else ""))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-3 else f"{1e3 * seconds:.2g}"


_REASONS = {
    "limits": "the fastest within the limits",
    "knee": "the knee of cache against loss",
    "no knee": "the closest to a knee: no candidate lies below the line between the extremes",
    "convention": "the conventional choice, since the loss is not known",
}


def _recommend(out: Any, advice: Any, source: str, output: Path | None, text: dict[str, Any]) -> None:
    from ..console import human_bytes

    chosen, original, setting = advice.chosen, advice.predictions[0], advice.setting
    if chosen is original:
        only = "it is the only one within every limit" if len(advice.predictions) > 1 else "it has no KV heads to share"
        if advice.choice.reason == "limits":
            only = "nothing faster is within every limit"
        out.label("recommended: leave the model as it is", "bold", f"; {only}", gap="")
        return
    out.label(f"recommended: {chosen.name}", "bold", f", {_REASONS[advice.choice.reason]}", gap="")
    saved = original.cache_bytes / chosen.cache_bytes
    speed = original.token_seconds / chosen.token_seconds
    before, after = (_milliseconds(one.token_seconds) for one in (original, chosen))
    compared = f"{speed:.2f} times faster" if speed >= 1 else f"{1 / speed:.2f} times slower"
    facts = {
        "cache": f"{human_bytes(original.cache_bytes)} → {human_bytes(chosen.cache_bytes)} in {setting.dtype}, "
        f"{saved:.1f} times smaller (batch {setting.batch:,}, context {setting.context:,})",
        "sequences": f"{original.largest_batch:,} → {chosen.largest_batch:,} fit",
        "time": f"{before} → {after} ms per token, {compared}",
        "loss": _loss(chosen),
        "certainty": advice.sure,
    }
    for name, value in facts.items():
        out.print(f"  {name + ':':<11}{value}")
    if advice.plan is None:
        return
    # A config without weights cannot be converted.
    place = "SRC" if Path(source).is_file() else source
    first = "" if output else "add -o plan.json, then: "
    out.print(first + command("convert", place, "DST", plan=output or "plan.json", **text))


def _loss(one: Any) -> str:
    """The predicted loss of a candidate in nats and perplexity, with its range."""
    when = ""
    low, value, high = one.loss_low, one.loss, one.loss_high
    if one.loss_after is not None:
        when = f" after uptraining ({one.loss:+.3f} before)"
        low, value, high = one.loss_after_low, one.loss_after, one.loss_after_high
    if value is not None:
        percent = [f"{math.expm1(nats):+,.1%}" for nats in (value, low, high)]
        return (
            f"{value:+.3f} nats per token ({low:.3f} to {high:.3f}), perplexity {percent[0]} "
            f"({percent[1]} to {percent[2]}){when}"
        )
    return "not known" if one.energy is None else f"not known; the heads lose {one.energy:.1%} of their energy"
