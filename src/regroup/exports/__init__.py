"""Checkpoints in the forms that serving engines read, each compared with its source before it appears."""
