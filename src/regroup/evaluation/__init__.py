"""What a conversion cost in quality: loss on held-out text, and distance from the original model."""

from ..data import Batch, causal_batches, pair_batches
from .score import Score, score

__all__ = ["Batch", "Score", "causal_batches", "pair_batches", "score"]
