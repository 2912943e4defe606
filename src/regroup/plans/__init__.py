"""What is wanted: for each layer how many KV heads, which query heads share one, and the rule that merges them."""

from .budget import allocate, layer_units, parse_budget, token_bytes
from .check import allowed_kv_heads
from .grouping import group_members, key_value_sources
from .make import make_plan, parse_layers
from .plan import ASKED_METHODS, BLIND_METHODS, LINEAR_METHODS, METHODS, LayerPlan, Plan
from .search import query_order, search_groups

__all__ = [
    "ASKED_METHODS",
    "BLIND_METHODS",
    "LINEAR_METHODS",
    "METHODS",
    "LayerPlan",
    "Plan",
    "allocate",
    "allowed_kv_heads",
    "group_members",
    "key_value_sources",
    "layer_units",
    "make_plan",
    "parse_budget",
    "parse_layers",
    "query_order",
    "search_groups",
    "token_bytes",
]
