"""Which device to run on, and what memory it has left."""

from __future__ import annotations

from pathlib import Path

from .errors import RegroupError, two_sizes

# Of the memory that is free, what a run may take.
USABLE = 0.9


def on_cpu(name: str | None) -> bool:
    """Whether a run that was asked for this device, or for none, runs on the CPU: there may be no GPU."""
    import torch

    return name == "cpu" or not torch.cuda.is_available()


def device_named(name: str | None) -> str:
    """A torch device that works here: the one that was asked for, else a GPU where there is one, else the CPU.

    Raises:
        RegroupError: no such device, or torch was built without it.
    """
    import torch

    chosen = name or ("cpu" if on_cpu(name) else "cuda")
    try:
        torch.zeros(1, device=chosen)
    # torch says it in three ways, by the kind of device.
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        raise RegroupError(
            "the device cannot be used",
            expected="cpu, cuda, cuda:1 or the like",
            got=f"{chosen}: {str(error).splitlines()[0][:160]}",
            remedy="leave --device out to use what there is",
        ) from error
    return chosen


def check_fits(needed: int, message: str, *, file: Path, got: str, remedy: str) -> None:
    """Refuse what would not fit into the memory that the CPU has left.

    Args:
        needed: bytes.
        message: what does not fit.
        file: that it is about.
        got: what the bytes are for.
        remedy: what to do.

    Raises:
        RegroupError: it needs more than ``USABLE`` of what is free.
    """
    free = free_memory("cpu")
    if free is not None and needed > USABLE * free:
        wanted, there_is = two_sizes(needed, free)
        raise RegroupError(
            message,
            file=file,
            expected=f"at most {USABLE:.0%} of the {there_is} that are free",
            got=f"about {wanted} for {got}",
            remedy=remedy,
        )


def free_memory(device: str) -> int | None:
    """Bytes that are free on a device; None where the system does not say."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)
