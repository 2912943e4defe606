"""``regroup advise``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import RegroupError
from ..safe_text import command
from .options import AllowPickle, Calibration, Revision, check_file, spread


@spread
def advise(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder, a hub id, or a config.json.")],
    *,
    hardware: Annotated[
        str, typer.Option(help="h100, a100-80gb, l4, …, or this: measure the machine that runs the command.")
    ],
    context: Annotated[
        int, typer.Option(min=2, max=10**9, help="Tokens a sequence; of an encoder-decoder, of its input.")
    ],
    batch: Annotated[int, typer.Option(min=1, max=10**9, help="Sequences at once.")],
    new: Annotated[int, typer.Option(min=2, max=10**9, help="Tokens that an encoder-decoder makes.")] = 256,
    dtype: Annotated[str, typer.Option(help="Of weights and cache: float32, bfloat16 or float16.")] = "bfloat16",
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share every layer.")] = 1,
    memory: Annotated[
        float | None, typer.Option(min=0, help="GB that a device may fill. [default: 90% of the hardware's]")
    ] = None,
    max_loss: Annotated[float | None, typer.Option(min=0, help="Nats a token over the parent, at most.")] = None,
    max_time: Annotated[float | None, typer.Option(min=0, help="Milliseconds a token, at most.")] = None,
    uptrain_tokens: Annotated[
        str | None, typer.Option(help="Tokens of distillation that will follow, such as 100M.")
    ] = None,
    bench: Annotated[
        list[Path] | None, typer.Option(help="A record of `regroup bench decode` on this hardware; several are fine.")
    ] = None,
    calibration: Calibration,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the recommended plan here.")] = None,
    record: Annotated[Path | None, typer.Option(help="Write the JSON record here.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw time against loss into this PNG.")] = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
) -> None:
    """How many KV heads? Predicts memory, time and loss of each number, uniform or by layer, and recommends one."""
    from ..advise.run import advise as run
    from ..console import Told, err, out
    from ..opening import readable
    from ..record import write_record, write_whole
    from ..uptrain.budget import parse_count

    if memory is not None and not math.isfinite(memory):
        raise RegroupError("the memory is not a number of GB", expected="such as 72", got=f"--memory {memory}")
    taken: dict[str, Path | None] = {f"the bench record {path}": path for path in bench or ()}
    for what, file in (("the plan", output), ("the record", record), ("the figure", figure)):
        if file is not None:
            check_file(file, taken)
            taken[what] = file
    text = calibration.text()
    with readable(source, revision=revision, allow_pickle=allow_pickle) as place:
        advice = run(
            place,
            hardware_name=hardware,
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
            listener=Told(),
        )
    out.print(_table(advice, batch))
    for line in advice.assumptions:
        out.print(f"- {line}")
    _recommend(out, advice, source, output, calibration.given())
    if figure is not None:
        from ..advise.plot import draw

        draw(advice.record, figure)
        err.print(f"wrote {figure}")
    if output is not None and advice.plan is not None:
        write_whole(output, advice.plan.dumps(), "the plan")
        err.print(f"wrote {output}")
    elif output is not None:
        err.print(f"no plan is needed, so {output} was not written")
    if record is not None:
        write_record(record, advice.record)
        err.print(f"wrote {record}")


def _table(advice: Any, batch: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    from ..errors import human_bytes

    first = advice.predictions[0]
    known, after = first.judged is not None, first.loss_after is not None
    measure = "loss" if first.loss is not None else "energy lost"
    columns = ["", "memory", "cache", "fits", "ms a token"]
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
    words = f"batch {batch}; fits: the largest batch; loss in nats a token over the parent"
    table.caption = Text(words + ("\n● nothing is both faster and better" if known else ""))
    return table


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}" if seconds >= 1e-3 else f"{1e3 * seconds:.2g}"


def _recommend(out: Any, advice: Any, source: str, output: Path | None, text: dict[str, Any]) -> None:
    chosen, parent = advice.chosen, advice.predictions[0]
    if chosen is parent:
        out.label("recommended: leave the model as it is", "bold", "; it keeps to every limit that was given", gap="")
        return
    saved = parent.cache_bytes / chosen.cache_bytes
    speed = parent.token_seconds / chosen.token_seconds
    words = f"a cache {saved:.1f} times smaller, {speed:.2f} times faster a token"
    if chosen.loss_after is not None:
        words += f", at {chosen.loss_after:.3f} nats a token after uptraining"
        words += f" ({chosen.loss_after_low:.3f} to {chosen.loss_after_high:.3f})"
    elif chosen.loss is not None:
        words += f", at {chosen.loss:.3f} nats a token ({chosen.loss_low:.3f} to {chosen.loss_high:.3f})"
    out.label(f"recommended: {chosen.name}", "bold", f": {words}", gap="")
    if advice.plan is None:
        return
    plan = output or "plan.json"
    before = "" if output else "add -o plan.json, then: "
    # A config alone cannot be converted: the checkpoint that it is of can.
    place = "SRC" if Path(source).is_file() else source
    out.print(before + command("convert", place, "DST", plan=plan, **text))
