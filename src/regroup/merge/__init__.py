"""Merge methods as pure tensor functions that know nothing of checkpoints; ``registry`` lists them, without torch."""
