"""Text files in, token windows out."""

from .batches import IGNORED, Batch, causal_batches, pair_batches
from .text import document_windows, read_pairs, read_texts, token_windows

__all__ = [
    "IGNORED",
    "Batch",
    "causal_batches",
    "document_windows",
    "pair_batches",
    "read_pairs",
    "read_texts",
    "token_windows",
]
