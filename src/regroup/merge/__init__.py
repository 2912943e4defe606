"""Merge rules: pure tensor functions that know nothing of checkpoints."""

from .pool import first, mean, random

__all__ = ["first", "mean", "random"]
