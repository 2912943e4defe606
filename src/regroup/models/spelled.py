"""A checkpoint's config in the words that transformers reads."""

from __future__ import annotations

from typing import Any

from ..layout.spelling import as_known


def spelled(config: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """The config in transformers' words, and whether it had others: transformers would build another model from them.

    Raises:
        RegroupError: it contradicts itself (see ``layout.spelling``).
    """
    found = as_known(config)
    return dict(found), found is not config
