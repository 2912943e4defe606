"""Who is told how a conversion or an export goes. Imports nothing that takes long: every command starts with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from .progress import Progress

if TYPE_CHECKING:
    from .calibration.calibrate import Calibrated
    from .opening import Source
    from .plans import Plan
    from .writer.preview import Preview


class Listener:
    """Told how a conversion or an export goes on; this one does not listen. The command line shows tables and bars."""

    def planned(self, source: Source, plan: Plan, ahead: Preview) -> None:
        """Everything is checked and nothing is written yet."""

    def notice(self, text: str) -> None:
        """Something that is worth a line."""

    def searching(self, layers: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something to call with 1 after each attention layer whose heads were grouped, or guessed about."""
        return contextlib.nullcontext(lambda count: None)

    def calibrating(self, layers: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something to call with 1 after each decoder layer."""
        return contextlib.nullcontext(lambda count: None)

    def calibrated(self, solved: Calibrated) -> None:
        """What calibration chose."""

    def writing(self, nbytes: int) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something to call, from any thread, with the number of bytes just written."""
        return contextlib.nullcontext(lambda count: None)

    def comparison_ahead(self, nbytes: int) -> None:
        """Nothing is written yet; what is will be compared with its source, in so many bytes of memory."""

    def stage(
        self, title: str, total: int | None = None, unit: str = ""
    ) -> contextlib.AbstractContextManager[Progress]:
        """Something to call with how much more of some other work is done."""
        return contextlib.nullcontext(Progress(title, total))

    def comparing(self) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Something to call with 1 after each of the two models that has answered."""
        return contextlib.nullcontext(lambda count: None)
