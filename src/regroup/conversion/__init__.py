"""Carry out requests: plan a conversion, and convert."""
