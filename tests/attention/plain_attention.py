"""Attention by PyTorch alone, in float64: KV heads repeated, every mask dense. Shares no code with the package.

``head_of`` and ``aligned`` are there to be got wrong: negative controls.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def plain(
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
    head_of: Callable[[int, int], int] | None = None,
    top_left: bool = False,
) -> Tensor:
    """(B, H, T, Dv) in float64."""
    B, H, T, D = query.shape
    G, S = key.shape[1:3]
    heads = [h // (H // G) if head_of is None else head_of(h, G) for h in range(H)]
    query, key, value = query.double(), key.double()[:, heads], value.double()[:, heads]
    added = torch.zeros(B, H, T, S, dtype=torch.float64)
    for extra in (mask, bias):
        if extra is not None and extra.dtype != torch.bool:
            added = added + extra.double()
    seen = torch.ones(B, H, T, S, dtype=torch.bool)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    own = torch.arange(T)[:, None] + (0 if top_left else S - T)
    if is_causal:
        seen = seen & (torch.arange(S) <= own)
    if window is not None:
        seen = seen & (torch.arange(S) > own - window)
    added = torch.where(seen, added, float("-inf"))
    factor = D**-0.5 if scale is None else scale
    if softcap is None:
        return scaled_dot_product_attention(query, key, value, attn_mask=added, scale=factor)
    scores = softcap * torch.tanh(query @ key.transpose(-1, -2) * factor / softcap) + added
    weights = torch.softmax(scores, -1)
    return torch.where(weights.isnan(), 0.0, weights) @ value
