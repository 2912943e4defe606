"""The mechanism: grouped-query attention, prefill and decode, by the backend that serves a call best."""

from .call import Call, make_call
from .grouped import BACKENDS, Choice, explain, grouped_query_attention

__all__ = ["BACKENDS", "Call", "Choice", "explain", "grouped_query_attention", "make_call"]
