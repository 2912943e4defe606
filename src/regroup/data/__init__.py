"""Text files in, token windows out."""

from .text import read_pairs, read_texts, token_windows

__all__ = ["read_pairs", "read_texts", "token_windows"]
