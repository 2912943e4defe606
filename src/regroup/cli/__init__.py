"""The command line: a module per command. Each imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import signal
import sys
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import AgreedError, RegroupError
from ..progress import on_terminal, quiet_libraries
from . import advise, bench, convert, demo, evaluate, export, inspect, plan, report, streams, uptrain, verify
from .options import Command, summary


class _Commands(TyperGroup):
    """Turns every error that a user can act on into a message and exit status 2."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        streams.accept_any_text()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except AgreedError as error:
            if not error.speaker:
                raise typer.Exit(2) from error
            _fail(str(error))
        except RegroupError as error:
            _fail(str(error))
        except KeyboardInterrupt:
            _fail("interrupted; no incomplete result was left")
        except OSError as error:
            _fail(str(RegroupError(f"the system refused: {error.strerror or error}", file=error.filename)))
        finally:
            streams.work_ended()


app = typer.Typer(
    name="regroup",
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # it takes "[default: 512]" in a help text for markup
    help="Convert multi-head checkpoints to grouped-query attention (GQA).",
)
for _command in (
    inspect.inspect,
    advise.advise,
    plan.plan,
    convert.convert,
    verify.verify,
    export.export,
    evaluate.evaluate,
    uptrain.uptrain,
    report.report,
    demo.demo,
):
    app.command(cls=Command, short_help=summary(_command))(_command)
app.add_typer(bench.app, name="bench", short_help=bench.app.info.help)


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(importlib.metadata.version("regroup-gqa"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``regroup`` command."""
    streams.guard_streams()
    streams.log_safely()
    release = streams.catch_signals()
    if not on_terminal():
        quiet_libraries()
    try:
        try:
            app(prog_name="regroup")
        finally:
            # Otherwise lost output is found only as the interpreter exits, too late for an exit status.
            sys.stdout.flush()
    except streams.LostOutputError as lost:
        if lost.unread:
            sys.exit(128 + signal.SIGPIPE)
        _say(str(RegroupError("standard output cannot be written", got=lost.reason)))
        sys.exit(2)
    finally:
        release()


def _fail(message: str) -> NoReturn:
    _say(message)
    raise typer.Exit(2)


def _say(message: str) -> None:
    from ..screen import Screen

    Screen(stderr=True).label("error:", "bold red", *message.split("\n"))
