"""Carry out requests: find a plan within a KV budget, and convert."""
