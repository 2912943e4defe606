"""What several processes of one run agree on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist

from ..errors import RegroupError


def rank() -> int:
    """This process's number; 0 where there is one process alone."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    """Wait for all."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def quiet_files() -> Iterator[None]:
    """Without transformers' bars for each file that it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class AgreedError(RegroupError):
    """An error that every process raises; ``speaker`` is True in the one that should say it."""

    def __init__(self, error: RegroupError, *, speaker: bool) -> None:
        details = error.details
        super().__init__(
            error.what,
            file=details["file"],
            tensor=details["tensor"],
            layer=details["layer"],
            expected=details["expected"],
            got=details["got"],
            remedy=details["remedy"],
        )
        self.speaker = speaker


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Let an error of one process stop all of them at the end of the block, so that none waits for it for ever.

    Every process has to enter the block, and inside it none may wait for another.

    Raises:
        RegroupError: the first process's error; an ``AgreedError`` where there are several processes.
        OSError: likewise, where there is one process alone.
    """
    if not dist.is_initialized():
        yield
        return
    failure: RegroupError | None = None
    try:
        yield
    except RegroupError as error:
        failure = error
    except OSError as error:
        failure = RegroupError("the system refused", file=error.filename, got=error.strerror or str(error))
    found: list[RegroupError | None] = [None] * world()
    # An exception with keyword arguments does not survive pickling by itself; its parts do.
    parts = None if failure is None else {"what": failure.what, **_plain(failure)}
    gathered: list[dict[str, str | None] | None] = [None] * world()
    dist.all_gather_object(gathered, parts)
    found = [None if part is None else RegroupError(str(part.pop("what")), **part) for part in gathered]
    first = next((error for error in found if error is not None), None)
    if first is not None:
        raise AgreedError(first, speaker=rank() == 0)


def _plain(error: RegroupError) -> dict[str, str | None]:
    return {name: None if value is None else str(value) for name, value in error.details.items()}
