"""Options that several verbs take, and what is made of them."""

from __future__ import annotations

import contextlib
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand

from ..errors import RegroupError

if TYPE_CHECKING:
    from ..plans import CalibrationText

Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pickled weights where there is nothing else, through a passing copy."),
]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", help="KV heads of every layer (1 is MQA).")]
Layers = Annotated[str | None, typer.Option(help="KV heads by layer, such as 0-3:8,4-31:4 or cross.0-5:2.")]
Method = Annotated[
    str | None,
    typer.Option(help="How heads are merged: auto, lowrank, procrustes, or the paper's mean, first, random."),
]
TensorParallel = Annotated[
    int | None, typer.Option(help="Devices that will share a layer; checked against the KV heads.")
]
Grouping = Annotated[
    str | None,
    typer.Option(
        help="contiguous: neighbours share a head; search: heads that belong together (the default with auto)."
    ),
]
Seed = Annotated[int | None, typer.Option(help="Of the random method and of the search.")]
Record = Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON record here.")]
Json = Annotated[bool, typer.Option("--json", help="Print the JSON record.")]


@dataclass(frozen=True)
class Calibration:
    """What ``plan`` and ``convert`` are told of the text to convert on; each field is an option of both."""

    calibration: Annotated[
        str | None,
        typer.Option(help="Text, JSON lines, a data set (hf:name), or pairs to convert on: slower, and far better."),
    ] = None
    calibration_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of it at most. [default: 65,536]")] = (
        None
    )
    calibration_window: Annotated[int | None, typer.Option(min=2, help="Tokens a window of it. [default: 512]")] = None
    calibration_batch: Annotated[
        int | None, typer.Option(min=1, help="Windows or pairs of it at a time. [default: 4]")
    ] = None
    document_starts: Annotated[
        bool,
        typer.Option("--document-starts", help="Begin windows where documents begin, instead of joining documents."),
    ] = False
    repair: Annotated[
        str | None,
        typer.Option(help="With calibration: none, output (solve output projections again, the default) or distill."),
    ] = None
    device: Annotated[str | None, typer.Option(help="Where calibration runs; a GPU where there is one.")] = None

    def given(self) -> dict[str, Any]:
        """The options as they were given, for the ``command`` that is advised next; those of a plan need its text."""
        if self.calibration is None:
            return {}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "device"}

    def text(self) -> CalibrationText | None:
        """The text that the options name, or None.

        Raises:
            RegroupError: options about text that is not there, or an unknown repair.
        """
        from ..plans import REPAIRS, CalibrationText

        if self.repair not in (None, *REPAIRS):
            raise RegroupError("the repair is not known", expected=", ".join(REPAIRS), got=self.repair)
        given = {
            "--calibration-tokens": self.calibration_tokens,
            "--calibration-window": self.calibration_window,
            "--calibration-batch": self.calibration_batch,
            "--document-starts": self.document_starts or None,
            "--repair": self.repair,
        }
        if self.calibration is None:
            useless = [name for name, value in given.items() if value is not None]
            if useless:
                raise RegroupError(
                    "an option needs calibration text, and there is none",
                    got=", ".join(useless),
                    remedy="add --calibration FILE, or leave it out",
                )
            return None
        sizes = {
            "tokens": self.calibration_tokens,
            "window": self.calibration_window,
            "batch": self.calibration_batch,
        }
        return CalibrationText(
            self.calibration,
            document_starts=self.document_starts,
            **{name: size for name, size in sizes.items() if size is not None},  # pyright: ignore[reportArgumentType]
        )


# What PyTorch and Python's own iterators count with.
_LARGEST = 2**63 - 1


class Verb(TyperCommand):
    """A command that refuses numbers which nothing counts with, before they end in some library's error."""

    def invoke(self, ctx: Any) -> Any:
        for parameter in self.params:
            value = ctx.params.get(parameter.name)
            if type(value) is int and abs(value) > _LARGEST:
                raise RegroupError(
                    "a number is too large",
                    expected=f"{parameter.opts[0]} of at most {_LARGEST:,}",
                    got=value,
                )
        return super().invoke(ctx)


def spread(verb: Callable[..., None]) -> Callable[..., None]:
    """Give a verb, in place of each parameter whose type is a dataclass of options, that dataclass's fields.

    typer reads a function's signature and knows no groups of options: it is shown the fields, and the verb gets the
    dataclass made of them.
    """
    signature = inspect.signature(verb, eval_str=True)
    groups: dict[str, Any] = {n: p.annotation for n, p in signature.parameters.items() if is_dataclass(p.annotation)}
    shown: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        members = inspect.signature(groups[name], eval_str=True).parameters.values() if name in groups else [parameter]
        shown += [member.replace(kind=inspect.Parameter.KEYWORD_ONLY) for member in members]

    def called(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        verb(**given, **made)

    called.__name__, called.__doc__, called.__module__ = verb.__name__, verb.__doc__, verb.__module__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in shown}
    called.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]
    return called


def summary(verb: Callable[..., None]) -> str:
    """The first line of a verb's help, whole: in a list of verbs the rest of a long one would be cut off."""
    return (verb.__doc__ or "").partition("\n")[0]


@contextlib.contextmanager
def resumable(output: Path, converted: Path | None = None) -> Iterator[None]:
    """Where uptraining is interrupted within the block, say what is kept of it and which command resumes.

    Args:
        output: folder of the run.
        converted: what is trained, where the same command makes that first.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        from ..processes import rank
        from ..uptraining import states

        if rank() > 0:
            raise
        saved = states.complete(output)
        command = _again()
        if (output / states.MODEL_FOLDER).exists():
            kept, file = "the result was complete already", output / states.MODEL_FOLDER
        elif saved:
            kept, file = f"the state after step {saved[-1][0]} is kept", saved[-1][1]
        elif (output / states.LOCAL_FOLDER / "config.json").is_file():
            kept, file = "what the local stage learnt is kept", output / states.LOCAL_FOLDER
        elif converted is not None and converted.exists():
            kept, file = "the conversion is complete and kept, and no state of the uptraining is", converted
        else:
            raise RegroupError(
                "interrupted before a state was saved",
                file=output if output.exists() else None,
                got="nothing to resume from",
                remedy=f"begin again with {command}, and with a smaller --save-every to lose less",
            ) from error
        raise RegroupError(f"interrupted; {kept}", file=file, remedy=f"resume from there with {command}") from error


def _again() -> str:
    """The command that this process was started with, ready for a shell; ``--no-resume`` would refuse to resume."""
    program, *words = sys.argv
    name = Path(program).name
    if Path(program).parts[-3:] == ("regroup", "cli", "__main__.py"):
        start = [Path(sys.executable).name, "-m", "regroup.cli"]
    elif name == "regroup":
        start = ["regroup"]
    else:
        return "the same command"
    text = shlex.join([*start, *(word for word in words if word != "--no-resume")])
    # A launcher's own words are not known here.
    return f"the same launcher and {text}" if "WORLD_SIZE" in os.environ else text


def check_file(output: Path, others: Mapping[str, Path | None] | None = None) -> None:
    """Refuse a file that cannot be written, before the work that would go into it.

    Args:
        output: the file.
        others: what the same run reads or writes elsewhere, by what it is; none of it may be the output.

    Raises:
        RegroupError: it is a folder or one of the others, or its place may not be written to.
    """
    from ..checkpoint.writer import existing_parent

    if output.is_dir():
        raise RegroupError("the output is a folder", file=output, remedy="name a file")
    if not os.access(output if output.exists() else existing_parent(output), os.W_OK):
        raise RegroupError("the output cannot be written", file=output, remedy="choose another place")
    for what, other in (others or {}).items():
        if other is not None and output.resolve() == other.resolve():
            raise RegroupError(
                "the output would overwrite what this run needs", file=output, got=what, remedy="name another file"
            )


def numbers(text: str) -> list[int]:
    """Whole numbers with commas between them, in the order given.

    Raises:
        RegroupError: the text is no such list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RegroupError("the numbers cannot be read", expected="such as 8,4,1", got=text) from None
