"""Attention the long way round, in float64 with every KV head repeated: shares no code with the package."""

from __future__ import annotations

import torch
from torch import Tensor


def dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """(B, H, T, Dv) in float64."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    key = key.double().repeat_interleave(heads // key.shape[1], dim=1)
    value = value.double().repeat_interleave(heads // value.shape[1], dim=1)
    scores = query.double() @ key.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias.double()
    if mask is not None and mask.is_floating_point():
        scores = scores + mask.double()
    for t in range(queries):
        own = t + keys - queries
        for j in range(keys):
            late = is_causal and j > own
            early = window is not None and j <= own - window
            if late or early:
                scores[:, :, t, j] = float("-inf")
    if mask is not None and not mask.is_floating_point():
        scores = torch.where(mask, scores, float("-inf"))
    weights = torch.exp(scores - scores.amax(-1, keepdim=True).clamp(min=-1e300))
    return weights @ value / weights.sum(-1, keepdim=True).clamp(min=1e-300)
