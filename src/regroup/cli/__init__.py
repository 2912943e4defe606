"""The command line: a module a verb. Each verb imports what it needs when it is called, so that ``--help`` is quick."""

from __future__ import annotations

import signal
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from ..errors import AgreedError, RegroupError
from ..progress import on_terminal, quiet_libraries
from . import advise, bench, convert, demo, evaluate, export, inspect, plan, report, uptrain, verify


class _Verbs(TyperGroup):
    """Turns whatever a user can act on into a message and exit status 2."""

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
            _fail("interrupted; nothing half-written was left behind")
        except OSError as error:
            _fail(
                f"the system refused: {error.strerror or error}"
                + (f"\n  file:     {error.filename}" if error.filename else "")
            )


app = typer.Typer(
    cls=_Verbs,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Turn a multi-head checkpoint into a grouped-query one.",
)
for _verb in (
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
    app.command()(_verb)
app.add_typer(bench.app, name="bench")


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        typer.echo(importlib.metadata.version("regroup-gqa"))
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``regroup`` command."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    # A service manager's stop cleans up as Ctrl-C does.
    signal.signal(signal.SIGTERM, stop)
    if not on_terminal():
        quiet_libraries()
    app()


def _fail(message: str) -> NoReturn:
    from rich.markup import escape

    from ..console import err

    err.print(f"[bold red]error:[/bold red] {escape(message)}")
    raise typer.Exit(2)
