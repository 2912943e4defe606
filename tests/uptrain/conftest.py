"""What tests of uptraining share."""

from __future__ import annotations

from pathlib import Path

import pytest

import runs


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a parent, a child of it and texts to train and to judge on. Shared: copy what is changed."""
    folder = tmp_path_factory.mktemp("shop")
    runs.pair(folder)
    runs.text(folder)
    return folder
