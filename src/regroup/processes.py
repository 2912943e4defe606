"""Several processes of one run: what they agree on, and how they divide text and add up their sums over it.

Errors travel with whatever is exchanged: a process that fails reports it where ``errors_shared`` ends, and the
others learn of it with whatever they exchange next. None waits for one that has stopped.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import AgreedError, RegroupError

T = TypeVar("T")
# The first process may write for hours while the others wait; one that dies is noticed by its closed connection.
_PATIENCE = timedelta(days=7)


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
def errors_shared() -> Iterator[None]:
    """Let an error of one process stop all of them at the end of the block, so that none waits for it for ever.

    Every process has to enter the block, and inside it none may wait for another but through a ``ProcessGroup``.

    Raises:
        RegroupError: the first process's error; an ``AgreedError`` where there are several processes.
        OSError: likewise, where there is one process alone.
        Exception: what nobody foresaw, in the process that it happened in; an ``AgreedError`` in the others.
    """
    if not dist.is_initialized():
        yield
        return
    failure: RegroupError | None = None
    unforeseen: Exception | None = None
    try:
        yield
    except AgreedError:
        raise  # all have heard of it
    except RegroupError as error:
        failure = error
    except OSError as error:
        failure = RegroupError("the system refused", file=error.filename, got=error.strerror or str(error))
    except Exception as error:
        unforeseen = error
        failure = RegroupError(
            "one of the processes failed",
            got=f"process {rank()}: {type(error).__name__}: {error}",
            remedy="see that process's own message",
        )
    try:
        _exchange(failure)
    except AgreedError as agreed:
        raise (unforeseen or agreed) from None


def _exchange(failure: RegroupError | None = None, said: object = None) -> list[Any]:
    """Tell all processes an error, or something small that pickles; what each of them said, in the order of ranks.

    Raises:
        AgreedError: the error of the first process that has one, in all of them.
    """
    # An exception with keyword arguments does not survive pickling by itself; its parts do.
    parts = None if failure is None else {"what": failure.what, **_plain(failure)}
    gathered: list[Any] = [None] * world()
    with _heard():
        dist.all_gather_object(gathered, (parts, said))
    errors = [error for error, _ in gathered if error is not None]
    if errors:
        what = errors[0].pop("what")
        raise AgreedError(RegroupError(what, **errors[0]), speaker=rank() == 0)
    return [said for _, said in gathered]


@contextlib.contextmanager
def _heard() -> Iterator[None]:
    """Say in our words that another process is gone, as one that the system killed."""
    try:
        yield
    except RuntimeError as error:
        gone = RegroupError(
            "another process of this run has ended",
            got=str(error).splitlines()[0][:200],
            remedy="see its own message or the launcher's; one that was killed had too little memory, as a rule",
        )
        raise AgreedError(gone, speaker=rank() == 0) from error


def _plain(error: RegroupError) -> dict[str, str | None]:
    return {name: None if value is None else str(value) for name, value in error.details.items()}


@dataclass(frozen=True)
class ProcessGroup:
    """The processes that share a piece of work; all of them call its methods in the same order.

    Batches are divided in turn: batch b belongs to process b mod ``size``, which numbers its own from 0. The first
    process decides; sums are the same bits in all. One process alone exchanges nothing.

    Attributes:
        rank: of this process.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def shard(self, batches: Sequence[T]) -> Sequence[T]:
        """This process's own batches.

        Raises:
            RegroupError: there are fewer batches than processes.
        """
        if len(batches) < self.size:
            raise RegroupError(
                "there are more processes than batches of calibration text",
                expected=f"at most {len(batches)} processes",
                got=str(self.size),
                remedy="start fewer processes, give more text, or a smaller --calibration-batch",
            )
        return batches if self.size == 1 else batches[self.rank :: self.size]

    def local_indices(self, start: int, stop: int) -> range:
        """Own numbers of those of the batches ``start`` to ``stop`` that belong to this process."""
        before, upto = (len(range(self.rank, end, self.size)) for end in (start, stop))
        return range(before, upto)

    def all_gather(self, value: T) -> list[T]:
        """A small value of every process, in the order of ranks."""
        return [value] if self.size == 1 else _exchange(said=value)

    def sum(self, value: float) -> float:
        """The sum of a number over all processes, added in float64 in the order of ranks."""
        return sum(self.all_gather(value))

    def sum_tensors(self, sums: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Tensors by name, each added over the processes that have one of that name.

        Args:
            sums: of any shapes and dtypes that are the same wherever the name is. They may be overwritten.

        Returns:
            All names of all processes, on the device of this process's tensor, or on the CPU where it had none. The
            same bits everywhere: each element is added in one process, and sent to the others.
        """
        if self.size == 1:
            return dict(sums)
        # gloo adds on the CPU alone. What can fail comes before the exchange, so that the others hear of it.
        here = {name: value.detach().cpu().contiguous() for name, value in sums.items()}
        forms: dict[str, tuple[torch.Size, torch.dtype]] = {}
        for named in self.all_gather({name: (value.shape, value.dtype) for name, value in here.items()}):
            forms = named | forms
        found = {}
        for name in sorted(forms):
            shape, dtype = forms[name]
            whole = here.pop(name) if name in here else torch.zeros(shape, dtype=dtype)
            with _heard():
                dist.all_reduce(whole)
            found[name] = whole.to(sums[name].device) if name in sums else whole
        return found

    def from_first(self, make: Callable[[], T]) -> T:
        """What the first process makes, which has to pickle and to lie on the CPU, in all of them."""
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.rank == 0 else None]
        self.all_gather(None)  # an error of any process, the first one's included
        with _heard():
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def call(self, function: Callable[..., object], *arguments: object) -> None:
        """Have the others, which ``assist``, call a function of a module with these arguments and ``processes``."""
        self.from_first(lambda: (function, arguments))

    def assist(self) -> None:
        """Do what the first process calls for, until it has finished."""
        while (wanted := self.from_first(_nothing)) is not None:
            function, arguments = wanted
            function(*arguments, processes=self)

    def device(self, name: str | None) -> str | None:
        """The device that ``name`` means here: GPUs are given out one a process, others as they are called.

        Raises:
            RegroupError: there are fewer GPUs than processes on this machine.
        """
        if self.size == 1 or name not in (None, "cuda") or not torch.cuda.is_available():
            return name
        place, count = int(os.environ.get("LOCAL_RANK", str(self.rank))), torch.cuda.device_count()
        if place >= count:
            raise RegroupError(
                "there are more processes than GPUs",
                expected=f"at most {count} processes on this machine",
                got=f"process {place} of it, counted from 0",
                remedy="start fewer processes, or pass --device cpu",
            )
        return f"cuda:{place}"


SINGLE_PROCESS = ProcessGroup()


def _nothing() -> Any:
    """What is made by a process that only receives, and by the first one when it calls for no more."""
    return None


@contextlib.contextmanager
def launched() -> Iterator[ProcessGroup]:
    """The processes that a launcher (``torchrun``, ``accelerate launch``) started, or this one alone.

    The first one works in the block, and may ``call`` on the others, which do nothing there but ``assist``.

    Raises:
        RegroupError: as ``errors_shared``, or an environment that names several processes and not where they meet.
    """
    if world() == 1:
        yield SINGLE_PROCESS
        return
    try:
        # Sums are merged on the CPU, so GPUs need no group of their own.
        dist.init_process_group("gloo", timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        apart = RegroupError(
            "the processes cannot find each other",
            got=str(error).splitlines()[0][:200],
            remedy="start them with torchrun or accelerate launch; where this process is alone, unset WORLD_SIZE",
        )
        raise AgreedError(apart, speaker=rank() == 0) from error
    processes = ProcessGroup(rank(), world())
    try:
        with errors_shared():
            yield processes
            if processes.rank == 0:
                processes.from_first(_nothing)
    except KeyboardInterrupt as error:
        if processes.rank == 0:
            raise
        # The launcher stops all; the first one says so.
        raise AgreedError(RegroupError("interrupted"), speaker=False) from error
    except Exception:
        # A launcher kills the others when one ends: none does while the first one still cleans up.
        with contextlib.suppress(RuntimeError):
            barrier()
        raise
    finally:
        leave()
