"""Whether text fills windows of one document each."""

from __future__ import annotations

from itertools import islice
from typing import Any

from ..data.sources import find_sources
from .objective import make_objective
from .own_text import is_own
from .recipe import Recipe

WINDOWS = {
    "documents": "each holds one document, from its beginning or a later place",
    "packed": "most documents are shorter than a window",
}
# Share of the tokens that windows of one document must hold.
_ENOUGH = 0.5
_CHUNKS = 2


def fitting_windows(recipe: Recipe, tokenizer: Any) -> str:
    """``"documents"`` where at least half of the text fills windows of one document, else ``"packed"``.

    The first chunks of each source are looked at.

    Raises:
        RegroupError: a source cannot be read.
    """
    objective = make_objective("causal", tokenizer, window=recipe.window, documents=True)
    body = recipe.window - (0 if tokenizer.bos_token_id is None else 1)
    held = there = 0
    given = [source for source in recipe.data if not is_own(source)]
    if not given:
        return "documents"
    for source in find_sources(given, pairs=False):
        for chunk in islice(source.chunks(), _CHUNKS):
            for document in objective.encode(tokenizer, chunk.documents):
                there += len(document)
                held += len(document) // body * body
    return "documents" if there and held >= _ENOUGH * there else "packed"
