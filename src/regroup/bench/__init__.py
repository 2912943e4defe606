"""Bytes and FLOPs by arithmetic, and what is measured against them."""
