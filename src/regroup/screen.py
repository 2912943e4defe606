"""A console without markup, for text that may hold any name."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .safe_text import visible


class Screen(Console):
    """Standard output or standard error.

    A string is one line: markup and emoji codes are not interpreted, control characters are escaped, and it is not
    wrapped. This holds for cells and titles of tables too. Several lines are several strings, with ``sep="\\n"``;
    ``label`` gives colour.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def print(self, *shown: Any, **options: Any) -> None:
        """Print; words and numbers of a table that are too wide are wrapped, never cut off."""
        for table in shown:
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
        super().print(*shown, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """rich calls this for every string."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    def label(self, word: str, style: str, *lines: str, gap: str = " ") -> None:
        """Print a coloured word followed by one or more lines.

        Args:
            word: such as ``"note:"``.
            style: a rich style, such as ``"yellow"``.
            lines: the text.
            gap: between the word and the first line.
        """
        first, *rest = lines or ("",)
        self.print(Text.assemble((visible(word), style), gap if first else "", visible(first)), *rest, sep="\n")

    def on_broken_pipe(self) -> None:
        """Re-raise, since rich would exit with status 1."""
        raise
