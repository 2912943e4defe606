"""What is known of each family (a ``model_type`` of transformers), as data: a file below ``known/`` per kin group.

Adding a family means adding an entry or a file there; nothing else lists families (docs/adding-a-family.md).
"""

from .family import Family
from .registry import FAMILIES, family_for, is_encoder_decoder

__all__ = ["FAMILIES", "Family", "family_for", "is_encoder_decoder"]
