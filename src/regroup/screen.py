"""A console on which names and values appear as they are."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .safe_text import visible


class Screen(Console):
    """Standard output or standard error, for text that may hold names from anywhere.

    A string is one line: there is no markup in it and no emoji code, what a terminal would obey is spelt out, line ends
    included, and it is not broken at the terminal's width. This holds for a table's cells and titles too. Several lines
    are several strings, with ``sep="\\n"``; colour is given by ``label``.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False, soft_wrap=True)

    def print(self, *shown: Any, **options: Any) -> None:
        """Print; where a terminal is too narrow for a table's words and numbers they are broken, never cut off."""
        for table in shown:
            if isinstance(table, Table):
                for column in table.columns:
                    column.overflow = "fold"
        super().print(*shown, **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Every string that is shown comes through here."""
        return super().render_str(visible(text), **{**options, "markup": False, "emoji": False})

    def label(self, word: str, style: str, *lines: str, gap: str = " ") -> None:
        """A coloured word, and after it a line that may be followed by more of them.

        Args:
            word: such as ``"note:"``; itself safe.
            style: rich's, such as ``"yellow"``.
            lines: what is said.
            gap: between the word and the first line.
        """
        first, *rest = lines or ("",)
        self.print(Text.assemble((visible(word), style), gap if first else "", visible(first)), *rest, sep="\n")

    def on_broken_pipe(self) -> None:
        """Let the command line decide (rich would leave with status 1). Called where the error is handled."""
        raise
