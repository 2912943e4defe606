"""Which device to run on."""

from __future__ import annotations

from .errors import RegroupError


def device_named(name: str | None) -> str:
    """A torch device that works here: the one that was asked for, or a GPU where there is one, or the CPU.

    Raises:
        RegroupError: no such device, or torch was built without it.
    """
    import torch

    chosen = name or ("cuda" if torch.cuda.is_available() else "cpu")
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
