"""Work of one stage, spread over processes. Not in ``__main__``, which such processes do not import."""

from __future__ import annotations

import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import Any

import torch
import transformers


class Pool:
    """Processes of one thread each, that do one stage after the other."""

    def __init__(self, processes: int, say: Callable[[str], None]) -> None:
        self.processes, self.say = processes, say

    def run(self, what: str, action: Callable[..., Any], jobs: Sequence[tuple[Any, ...]]) -> None:
        """Do a stage's jobs, and report progress.

        Raises:
            RegroupError: of the first job that fails; those that are done are kept.
        """
        begun = time.monotonic()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.processes, context, initializer=_begin, initargs=(self.processes,)) as pool:
            running = [pool.submit(action, *job) for job in jobs]
            for number, future in enumerate(as_completed(running), 1):
                try:
                    future.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
                if number % 10 == 0 or number == len(jobs):
                    self.say(f"{what}: {number} of {len(jobs)}, {(time.monotonic() - begun) / 60:.1f} min")


def _begin(processes: int) -> None:
    # Bars of saving and notes on T5's head, from several processes at once. A Trainer sets its library's level anew,
    # but not that of one module.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    transformers.logging.disable_progress_bar()
    if processes > 1:
        torch.set_num_threads(1)
