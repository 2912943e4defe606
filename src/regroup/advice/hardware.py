"""Accelerators, with the figures of their manufacturers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from ..errors import RegroupError

GB = 10**9
TB = 10**12


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        memory: bytes.
        bandwidth: bytes per second.
        rates: operations per second of dense matrix products (without sparsity), by dtype.
        source: the source of the figures.
    """

    name: str
    memory: int
    bandwidth: float
    rates: Mapping[str, float]
    source: str

    def rate(self, dtype: str) -> float:
        """Operations per second in a dtype.

        Raises:
            RegroupError: the table has no rate for it.
        """
        if dtype not in self.rates:
            raise RegroupError(
                "the hardware's rate in this dtype is not in the table",
                expected=", ".join(self.rates),
                got=f"{dtype} on {self.name}",
            )
        return self.rates[dtype]


def _device(name: str, memory: int, bandwidth: float, half: float, full: float, source: str) -> Hardware:
    return Hardware(name, memory * GB, bandwidth, {"bfloat16": half, "float16": half, "float32": full}, source)


# Rates of tensor cores in 16 bits, and without tensor cores in float32.
KNOWN = {
    device.name: device
    for device in (
        _device("h200", 141, 4.8 * TB, 989e12, 67e12, "NVIDIA H200 data sheet"),
        _device("h100", 80, 3.35 * TB, 989e12, 67e12, "NVIDIA H100 SXM data sheet"),
        _device("h100-pcie", 80, 2.0 * TB, 756e12, 51e12, "NVIDIA H100 PCIe data sheet"),
        _device("a100-80gb", 80, 2.039 * TB, 312e12, 19.5e12, "NVIDIA A100 80GB SXM data sheet"),
        _device("a100-40gb", 40, 1.555 * TB, 312e12, 19.5e12, "NVIDIA A100 40GB data sheet"),
        _device("l40s", 48, 864 * GB, 362e12, 91.6e12, "NVIDIA L40S data sheet"),
        _device("l4", 24, 300 * GB, 121e12, 30.3e12, "NVIDIA L4 data sheet"),
        _device("a10", 24, 600 * GB, 125e12, 31.2e12, "NVIDIA A10 data sheet"),
        _device("rtx-4090", 24, 1008 * GB, 165.2e12, 82.6e12, "NVIDIA Ada architecture white paper"),
        _device("rtx-3090", 24, 936 * GB, 71e12, 35.6e12, "NVIDIA Ampere GA102 white paper"),
        _device("mi300x", 192, 5.3 * TB, 1307.4e12, 163.4e12, "AMD Instinct MI300X data sheet"),
    )
}


def named(name: str) -> Hardware:
    """A device of the table.

    Raises:
        RegroupError: it is not in the table.
    """
    key = name.lower().replace("_", "-").replace(" ", "-")
    if key not in KNOWN:
        close = get_close_matches(key, (*KNOWN, "this"), n=3)
        raise RegroupError(
            "the hardware is not in the table",
            expected=" or ".join(close) if close else ", ".join(KNOWN) + ", or this",
            got=name,
            remedy="choose one from the table, or run this on the hardware itself with --hardware this",
        )
    return KNOWN[key]
