"""Grouped-query attention, prefill and decode, with the best backend for each call."""

from .call import Call, make_call
from .grouped import BACKENDS, Choice, explain, grouped_query_attention

__all__ = ["BACKENDS", "Call", "Choice", "explain", "grouped_query_attention", "make_call"]
