"""The query heads of a group folded into the query length: each KV head is read once for its whole group.

The folded query is (B, G, R · T, D) with R = H / G, so that scores and sums are matrix products over the KV heads
that there are, and nothing of the cache is repeated (Ainslie et al. 2023, section 2.2; Shazeer 2019, section 3).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .call import Call

# Scores in memory at once, in elements: longer queries go in pieces.
_PIECE = 1 << 24


def reason(call: Call) -> str | None:
    """Why this backend cannot serve a call: it serves every one."""
    return None


def run(call: Call) -> Tensor:
    """Attention with the groups folded, in pieces of the queries.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    length = call.query_length
    rows = max(1, _PIECE // (call.batch * call.num_heads * call.context))
    if rows >= length:
        return _piece(call, 0, length)
    return torch.cat([_piece(call, start, min(start + rows, length)) for start in range(0, length, rows)], 2)


def _rows(tensor: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
    """The part of a mask or bias for some queries and keys; what broadcasts stays as it is."""
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, start:stop]
    return tensor[..., first:last] if tensor.shape[3] > 1 else tensor


def _folded(tensor: Tensor, groups: int) -> Tensor:
    """A mask or bias as (b, g, r, t, s), a view: heads split into groups, or left to broadcast."""
    return tensor.unflatten(1, (groups, -1)) if tensor.shape[1] > 1 else tensor.unsqueeze(1)


def _piece(call: Call, start: int, stop: int) -> Tensor:
    B, G, R, T = call.batch, call.num_key_value_heads, call.group, stop - start
    first, last = call.span(start, stop)
    key, value = call.key[:, :, first:last], call.value[:, :, first:last]
    query = call.query[:, :, start:stop].reshape(B, G, R * T, call.head_dim)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = torch.matmul(query.to(wide) * call.scale, key.to(wide).transpose(-1, -2))
    scores = scores.view(B, G, R, T, last - first)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    hidden = call.positions(start, stop)
    if hidden is not None:
        scores = scores.masked_fill(~hidden, float("-inf"))
    may_die = False
    for extra in (call.bias, call.mask):
        if extra is None:
            continue
        may_die = True
        part = _folded(_rows(extra, start, stop, first, last), G)
        scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
    scores = scores.view(B, G, R * T, last - first)
    if may_die:
        top = scores.detach().amax(-1, keepdim=True)
        weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
        total = weights.sum(-1, keepdim=True)
        out = torch.matmul(weights, value.to(wide)) / total.masked_fill(total == 0, 1.0)
    else:
        out = torch.matmul(torch.softmax(scores, -1), value.to(wide))
    return out.view(B, G, R, T, call.value_dim).flatten(1, 2).to(call.query.dtype)
