"""Grouped-query attention as defined, the reference for the tests of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor

from ..call import Call
from ..registry import Backend, Preference, register


def unsupported_reason(call: Call) -> str | None:
    """None: it serves every call."""
    return None


def run(call: Call) -> Tensor:
    """Attention by einsum, in float32 (float64 if the call is), with all scores in memory at once.

    Vaswani et al. 2017, equation 1, with the KV head of each group shared (Ainslie et al. 2023, section 2.2).

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    wide = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query = call.query.to(wide).unflatten(1, (call.num_key_value_heads, call.group))
    scores = torch.einsum("bgrtd,bgsd->bgrts", query, call.key.to(wide)).flatten(1, 2) * call.scale
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    if call.bias is not None:
        scores = scores + call.bias
    shift = call.context - call.query_length
    rows = torch.arange(call.query_length, device=scores.device)[:, None] + shift
    columns = torch.arange(call.context, device=scores.device)[None, :]
    hidden = torch.zeros_like(scores, dtype=torch.bool)
    if call.is_causal:
        hidden = hidden | (columns > rows)
    if call.window is not None:
        hidden = hidden | (columns <= rows - call.window)
    if call.mask is not None:
        if call.mask.dtype == torch.bool:
            hidden = hidden | ~call.mask
        else:
            scores = scores + call.mask
    scores = scores.masked_fill(hidden, float("-inf"))
    dead = (scores == float("-inf")).all(-1, keepdim=True)
    # The softmax of a row of -inf and its gradient are NaN, so such rows are replaced first.
    weights = torch.softmax(scores.masked_fill(dead, 0.0), -1).masked_fill(dead, 0.0)
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    weights = weights.unflatten(1, (call.num_key_value_heads, call.group))
    return torch.einsum("bgrts,bgsv->bgrtv", weights, call.value.to(wide)).flatten(1, 2).to(call.query.dtype)


register(
    Backend(
        name="reference",
        preferences=(
            Preference(100, lambda call: call.is_empty, "there is nothing to compute"),
            Preference(0, lambda call: True, "it serves every call, of any length"),
        ),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could, in float32 with all scores in memory; it is the reference for tests",
    )
)
