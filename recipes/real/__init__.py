"""Conversions of real models, measured from the first step to the last: ``python -m recipes.real``."""
