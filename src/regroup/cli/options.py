"""Options that several commands share, and helpers for them."""

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
from ..merge.registry import METHODS

if TYPE_CHECKING:
    from ..plans import CalibrationText

Source = Annotated[str, typer.Argument(metavar="SRC", help="A checkpoint folder or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of the hub repository.")]
AllowPickle = Annotated[
    bool,
    typer.Option("--allow-pickle", help="Read pickled weights if there are no others, by way of a temporary copy."),
]
KVHeads = Annotated[int | None, typer.Option("--kv-heads", help="Number of KV heads of every layer (1 is MQA).")]
Layers = Annotated[str | None, typer.Option(help="Number of KV heads by layer, such as 0-3:8,4-31:4 or cross.0-5:2.")]
Method = Annotated[
    str | None,
    typer.Option(
        help=f"How to merge heads: auto, or one of {', '.join(METHODS)}; mean, first and random are the paper's."
    ),
]
TensorParallel = Annotated[
    int | None, typer.Option(help="Number of tensor-parallel devices; checked against the KV heads.")
]
Grouping = Annotated[
    str | None,
    typer.Option(help="contiguous: merge adjacent heads; search: group similar heads first (the default with auto)."),
]
Seed = Annotated[int | None, typer.Option(help="Seed of the random method and of the search.")]
Record = Annotated[Path | None, typer.Option("--output", "-o", help="Write the JSON record here.")]
Json = Annotated[bool, typer.Option("--json", help="Print the JSON record.")]


@dataclass(frozen=True)
class Calibration:
    """Options of ``advise``, ``plan`` and ``convert`` for calibration text; each field is an option."""

    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="none|self[:TOKENS]|FILE|self[:TOKENS],FILE",
            help="Calibration data: none (weights alone), self (text that the original model writes), text, JSON "
            "lines, pairs or a data set (hf:name), or both. [default: self for convert and plan with method auto, "
            "else none]",
        ),
    ] = None
    calibration_tokens: Annotated[
        int | None, typer.Option(min=1, help="Maximum number of calibration tokens. [default: 65,536; of self 16,384]")
    ] = None
    calibration_window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per calibration window. [default: 512]")
    ] = None
    calibration_batch: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Calibration batch size, in windows or pairs. [default: 4, but windows of 512 tokens in all at most]",
        ),
    ] = None
    document_starts: Annotated[
        bool,
        typer.Option("--document-starts", help="Start windows at document starts instead of concatenating documents."),
    ] = False
    repair: Annotated[
        str | None,
        typer.Option(
            help="Repair after merging: none, output (refit the output projections) or distill (train each layer's "
            "attention first, the default)."
        ),
    ] = None
    device: Annotated[
        str | None, typer.Option(help="Device for calibration. [default: a GPU if available, else cpu]")
    ] = None

    def as_options(self) -> dict[str, Any]:
        """The options as they were given, for a ``command`` that is suggested next."""
        if self.calibration is None:
            return {}
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "device"}

    def text(self, *, usual: bool = False, seed: int | None = None) -> CalibrationText | str | None:
        """The text that the options name, ``"none"`` where they say so, or None where they say nothing.

        Args:
            usual: where nothing is said the model writes text itself, to which the other options apply.
            seed: of that text.

        Raises:
            RegroupError: options about text that is not there, or an unknown repair.
        """
        from ..plans import NO_TEXT, OWN_TEXT, REPAIRS, CalibrationText

        if self.repair not in (None, *REPAIRS):
            raise RegroupError("the repair is not known", expected=", ".join(REPAIRS), got=self.repair)
        sizes = {
            "tokens": self.calibration_tokens,
            "window": self.calibration_window,
            "batch": self.calibration_batch,
            "document_starts": self.document_starts or None,
        }
        given = {
            "--calibration-tokens": self.calibration_tokens,
            "--calibration-window": self.calibration_window,
            "--calibration-batch": self.calibration_batch,
            "--document-starts": self.document_starts or None,
        }
        unused = [name for name, value in {**given, "--repair": self.repair}.items() if value is not None]
        if unused and (self.calibration == NO_TEXT or (self.calibration is None and not usual)):
            raise RegroupError(
                "an option was given that needs calibration text",
                got=", ".join(unused),
                remedy="add --calibration FILE or --calibration self, or remove the option",
            )
        if self.calibration is None:
            sized = any(value is not None for value in given.values())
            return CalibrationText.parse(OWN_TEXT, seed=seed or 0, **sizes) if sized else None
        return CalibrationText.parse(self.calibration, seed=seed or 0, **sizes) or NO_TEXT


# The largest int64, which PyTorch and Python's iterators count with.
_LARGEST = 2**63 - 1


class Command(TyperCommand):
    """A command that refuses numbers beyond int64, before a library fails on them."""

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


def with_option_groups(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is a dataclass of options by the fields of that dataclass.

    typer reads a function's signature and has no groups of options: it sees the fields, and the function gets the
    dataclass.
    """
    signature = inspect.signature(function, eval_str=True)
    groups: dict[str, Any] = {n: p.annotation for n, p in signature.parameters.items() if is_dataclass(p.annotation)}
    parameters: list[inspect.Parameter] = []
    for name, parameter in signature.parameters.items():
        members = inspect.signature(groups[name], eval_str=True).parameters.values() if name in groups else [parameter]
        parameters += [member.replace(kind=inspect.Parameter.KEYWORD_ONLY) for member in members]

    def called(**given: Any) -> None:
        made = {name: group(**{f.name: given.pop(f.name) for f in fields(group)}) for name, group in groups.items()}
        function(**given, **made)

    called.__name__, called.__doc__, called.__module__ = function.__name__, function.__doc__, function.__module__
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    called.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return called


def summary(function: Callable[..., None]) -> str:
    """The first line of a command's help, for the list of commands."""
    return (function.__doc__ or "").partition("\n")[0]


@contextlib.contextmanager
def resumable(output: Path, converted: Path | None = None) -> Iterator[None]:
    """If uptraining is interrupted within the block, say what was kept and which command resumes it.

    Args:
        output: folder of the run.
        converted: the checkpoint that is trained, if the same command converts it first.
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
            kept, file = "the result was already complete", output / states.MODEL_FOLDER
        elif saved:
            kept, file = f"the state after step {saved[-1][0]} is kept", saved[-1][1]
        elif converted is not None and converted.exists():
            kept, file = "the conversion is complete and kept; the uptraining saved no state", converted
        else:
            raise RegroupError(
                "interrupted before a state was saved",
                file=output if output.exists() else None,
                got="no saved state to resume from",
                remedy=f"start again with {command}; a smaller --save-every loses less",
            ) from error
        raise RegroupError(f"interrupted; {kept}", file=file, remedy=f"resume from there with {command}") from error


def _again() -> str:
    """The command that started this process, quoted for a shell and without ``--no-resume``."""
    program, *words = sys.argv
    name = Path(program).name
    if Path(program).parts[-3:] == ("regroup", "cli", "__main__.py"):
        start = [Path(sys.executable).name, "-m", "regroup.cli"]
    elif name == "regroup":
        start = ["regroup"]
    else:
        return "the same command"
    text = shlex.join([*start, *(word for word in words if word != "--no-resume")])
    # The arguments of the launcher are not known here.
    return f"the same launcher and {text}" if "WORLD_SIZE" in os.environ else text


def check_file(output: Path, others: Mapping[str, Path | None] | None = None) -> None:
    """Refuse an output file that cannot be written, before the work starts.

    Args:
        output: the file.
        others: other files that the run reads or writes, by description; the output may be none of them.

    Raises:
        RegroupError: it is a folder, one of the others, or not writable.
    """
    from ..checkpoint.writer import existing_parent

    if output.is_dir():
        raise RegroupError("the output is a folder", file=output, remedy="name a file")
    if not os.access(output if output.exists() else existing_parent(output), os.W_OK):
        raise RegroupError("the output cannot be written", file=output, remedy="choose another path")
    for what, other in (others or {}).items():
        if other is not None and output.resolve() == other.resolve():
            raise RegroupError(
                "the output would overwrite a file that this run uses",
                file=output,
                got=what,
                remedy="name another file",
            )


def numbers(text: str) -> list[int]:
    """Integers separated by commas, in the order given.

    Raises:
        RegroupError: the text is not such a list.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise RegroupError("this is not a list of integers", expected="such as 8,4,1", got=text) from None
