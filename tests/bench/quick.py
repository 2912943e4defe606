"""The machine is measured in no time, for tests of everything else."""

from __future__ import annotations

import pytest

from regroup.bench import attention, machine


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_SECONDS", 0.005)
    monkeypatch.setattr(machine, "_READ_BYTES", 1 << 20)
    monkeypatch.setattr(attention, "_SHAPE_SECONDS", 0.01)
    monkeypatch.setattr(attention, "_RUN_SECONDS", 1e-5)
    monkeypatch.setattr(attention, "_COLD_BYTES", 1 << 20)
