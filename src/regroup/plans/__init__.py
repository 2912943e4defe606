"""What is asked of a checkpoint: for each layer how many KV heads, which query heads share one, and how they merge."""

from .budget import allocate, layer_units, parse_budget, token_bytes
from .calibration import NO_TEXT, OWN_TEXT, OWN_TEXT_FILE, OWN_TOKENS, CalibrationText
from .check import allowed_kv_heads
from .grouping import group_members, key_value_sources
from .layer import LayerPlan
from .make import make_plan, parse_layers, spelled_out
from .plan import ASKED_METHODS, DEFAULT_REPAIR, REPAIRS, Plan
from .result import PLAN_FILE, RESULT_FILE, Result, found_plan
from .search import query_order, search_groups

__all__ = [
    "ASKED_METHODS",
    "DEFAULT_REPAIR",
    "NO_TEXT",
    "OWN_TEXT",
    "OWN_TEXT_FILE",
    "OWN_TOKENS",
    "PLAN_FILE",
    "REPAIRS",
    "RESULT_FILE",
    "CalibrationText",
    "LayerPlan",
    "Plan",
    "Result",
    "allocate",
    "allowed_kv_heads",
    "found_plan",
    "group_members",
    "key_value_sources",
    "layer_units",
    "make_plan",
    "parse_budget",
    "parse_layers",
    "query_order",
    "search_groups",
    "spelled_out",
    "token_bytes",
]
