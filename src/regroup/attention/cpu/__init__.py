"""Compiled kernels for CPUs, and what builds them."""
