"""What is wanted: for each layer how many KV heads, which query heads share one, and the rule that merges them."""

from .grouping import group_members, key_value_sources
from .plan import LINEAR_METHODS, METHODS, LayerPlan, Plan, make_plan, parse_layers

__all__ = [
    "LINEAR_METHODS",
    "METHODS",
    "LayerPlan",
    "Plan",
    "group_members",
    "key_value_sources",
    "make_plan",
    "parse_layers",
]
