"""Callbacks for the progress of a conversion or an export. Imports nothing slow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from .progress import Progress

if TYPE_CHECKING:
    from .calibration.calibrate import Calibrated
    from .calibration.own_time import OwnTextAhead
    from .opening import Source
    from .plans import Plan
    from .writer.preview import Preview


class Listener:
    """Callbacks for the progress of a conversion or an export; these do nothing.

    Methods that return a context manager give a function to call as the work proceeds.
    """

    def planned(self, source: Source, plan: Plan, ahead: Preview) -> None:
        """Called after all checks and before anything is written."""

    def notice(self, text: str) -> None:
        """A message for the user."""

    def own_text(self, ahead: OwnTextAhead) -> None:
        """Called before the original model writes calibration text, with what that will take."""

    def writing_text(self, tokens: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Called with the number of tokens of calibration text that the original model just wrote."""
        return contextlib.nullcontext(lambda count: None)

    def searching(self, layers: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Called with 1 after each attention layer whose heads were grouped or estimated."""
        return contextlib.nullcontext(lambda count: None)

    def calibrating(self, layers: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Called with 1 after each decoder layer."""
        return contextlib.nullcontext(lambda count: None)

    def calibrated(self, solved: Calibrated) -> None:
        """The result of calibration."""

    def writing(self, nbytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Called, from any thread, with the number of bytes just written."""
        return contextlib.nullcontext(lambda count: None)

    def comparison_ahead(self, nbytes: int) -> None:
        """Called before anything is written, with the memory that the comparison with the source will take."""

    def stage(
        self, title: str, total: int | None = None, unit: str = ""
    ) -> contextlib.AbstractContextManager[Progress]:
        """Any other work; called with the amount just done."""
        return contextlib.nullcontext(Progress(title, total))

    def comparing(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Called with 1 after each of the two models was run."""
        return contextlib.nullcontext(lambda count: None)
