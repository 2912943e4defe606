"""docs/cli.md, from the command line itself: run it after a verb or an option has changed.

    python recipes/cli_reference.py            # writes the page
    python recipes/cli_reference.py --check    # says whether the page is what the command line has

Typer's own generator writes it, which knows neither the terminal's width nor its colours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.main
from typer.cli import get_docs_for_click

from regroup.cli import app

PAGE = Path(__file__).parents[1] / "docs/cli.md"


def page() -> str:
    command = typer.main.get_command(app)
    context = typer.Context(command, info_name="regroup")
    text = get_docs_for_click(obj=command, ctx=context, name="regroup", title="Command line")
    return "<!-- Made by recipes/cli_reference.py. -->\n\n" + text.rstrip() + "\n"


def main(check: Annotated[bool, typer.Option("--check")] = False) -> None:
    current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
    if check:
        print("the page is what the command line has" if current else f"{PAGE.name} is not what the command line has")
        sys.exit(not current)
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}")


if __name__ == "__main__":
    typer.run(main)
