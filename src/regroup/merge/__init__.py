"""Merge rules: pure tensor functions that know nothing of checkpoints."""

from .lowrank import low_rank
from .pool import first, mean, random
from .procrustes import procrustes
from .residual import linear_residual, pair_residuals, rotary_residual
from .rotary import rotary_low_rank, rotary_procrustes
from .sharing import Sharing, error, owners, pooled

__all__ = [
    "Sharing",
    "error",
    "first",
    "linear_residual",
    "low_rank",
    "mean",
    "owners",
    "pair_residuals",
    "pooled",
    "procrustes",
    "random",
    "rotary_low_rank",
    "rotary_procrustes",
    "rotary_residual",
]
