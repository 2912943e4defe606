"""What a process does that helps the first one with calibration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..devices import device_named
from ..opening import open_source
from ..processes import ProcessGroup


def run_alongside(
    folder: Path, device: str | None, work: Callable[..., object], *arguments: object, processes: ProcessGroup
) -> None:
    """Do ``work`` on the same checkpoint and with the same arguments as the first process."""
    place = device_named(processes.device(device))
    with open_source(str(folder)) as opened:
        work(opened.checkpoint, opened.layout, *arguments, device=place, processes=processes)
