"""Text that a model writes itself: sampled, the same for the same seed, and looked at before it is used."""

from ..errors import DegenerateTextError
from .loading import open_sampler
from .sampler import STREAMS, Sampler
from .vocabulary import STARTS, Vocabulary

__all__ = ["STARTS", "STREAMS", "DegenerateTextError", "Sampler", "Vocabulary", "open_sampler"]
