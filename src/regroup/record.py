"""Result records: JSON objects with configuration, results, versions and machine."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import math
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import RegroupError
from .files import replacing

PACKAGES = ("regroup-gqa", "torch", "transformers", "safetensors", "numpy")


def record(kind: str, configuration: Mapping[str, Any], results: Mapping[str, Any]) -> dict[str, Any]:
    """A record of one measurement.

    Args:
        kind: what was measured, such as ``"evaluate/language-modeling"``.
        configuration: everything needed to reproduce it.
        results: the measurements; names include units.
    """
    return {
        "kind": kind,
        "format": 1,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "configuration": dict(configuration),
        "results": dict(results),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES}
        | {"python": platform.python_version()},
        "machine": machine(),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator, and nothing that identifies the host."""
    import os

    import torch

    facts: dict[str, Any] = {
        "processor": _first_value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if (memory := _first_value("/proc/meminfo", "MemTotal")) is not None:
        facts["memory_gb"] = round(int(memory.split()[0]) / 2**20, 1)
    if torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return facts


def write_record(path: Path | None, value: Mapping[str, Any]) -> None:
    """Write a record to a file, or to standard output for None.

    Raises:
        RegroupError: the file cannot be written.
    """
    # A terminal may lack characters, or interpret some.
    text = json.dumps(_plain(value), indent=2, ensure_ascii=path is None, allow_nan=False) + "\n"
    if path is None:
        sys.stdout.write(text)
        return
    write_whole(path, text, "the record")


def write_whole(path: Path, text: str, what: str) -> None:
    """Write a text file as UTF-8, atomically.

    Args:
        path: of the file; its folder is created.
        text: the content.
        what: description of the file for the error, such as ``"the record"``.

    Raises:
        RegroupError: the file cannot be written; an existing file is unchanged.
    """
    try:
        with replacing(path) as stage:
            stage.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RegroupError(f"{what} cannot be written", file=path, got=error.strerror or str(error)) from error


def _plain(value: Any) -> Any:
    """Values for JSON: null for infinite numbers and NaN, escapes for bytes of names that are not UTF-8."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _first_value(file: str, key: str) -> str | None:
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), None)
