"""One call of PyTorch's ``scaled_dot_product_attention`` with everything hidden in one mask, and no branch on sizes.

For graphs that serve any length (``torch.compile`` with dynamic shapes, ``torch.export``, ``torch.jit.trace``), and for
dropout. The mask is as large as the scores of one head; there is none if no key is hidden or the call is only causal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..call import Call
from ..masks import addable, sum_of_extras
from ..registry import Backend, Preference, register
from ..sizes import is_certain, is_traced


def unsupported_reason(call: Call) -> str | None:
    """The reason why this backend cannot serve a call, or None."""
    return None if call.softcap is None else "SDPA has no soft cap"


def run(call: Call) -> Tensor:
    """Attention by one call of SDPA.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    extra, is_causal = _added(call)
    query, R = call.query, call.group
    key, value = call.key, call.value
    # Otherwise SDPA would repeat the KV heads in memory, so a group's query heads are folded into the queries.
    folds = R > 1 and not is_causal and (extra is None or not _takes_groups(call))
    if folds:
        G, T = call.num_key_value_heads, call.query_length
        query = query.unflatten(1, (G, R)).flatten(2, 3)
        if extra is not None:
            extra = extra.unflatten(1, (G, R)) if extra.shape[1] > 1 else extra.unsqueeze(1)
            extra = extra.expand(-1, -1, R, T, call.context).flatten(2, 3)
    elif extra is not None:
        extra = extra.expand(-1, -1, call.query_length, call.context)
    out = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=None if extra is None else addable(extra, query.dtype),
        dropout_p=call.dropout,
        is_causal=is_causal,
        scale=call.scale,
        enable_gqa=R > 1 and not folds,
    )
    return out.unflatten(2, (R, call.query_length)).flatten(1, 2) if folds else out


def _takes_groups(call: Call) -> bool:
    """Whether SDPA supports grouped heads with a mask."""
    return call.query.device.type == "cpu" and is_certain(call.head_dim == call.value_dim)


def _added(call: Call) -> tuple[Tensor | None, bool]:
    """What is added to the scores or masks them, and whether SDPA's ``is_causal`` replaces it."""
    if call.window is None:
        if not call.is_causal:
            return sum_of_extras(None, (call.bias, call.mask)), False
        # SDPA aligns the first query with the first key, which is the same with as many queries as keys.
        square = not is_traced() and is_certain(call.query_length == call.context)
        if square and call.bias is None and call.mask is None:
            return None, True
    rows = torch.arange(call.query_length, device=call.query.device)[:, None] + (call.context - call.query_length)
    columns = torch.arange(call.context, device=call.query.device)[None, :]
    visible = torch.ones_like(columns <= rows)
    if call.is_causal:
        visible = columns <= rows
    if call.window is not None:
        visible = visible & (columns > rows - call.window)
    return sum_of_extras(visible[None, None], (call.bias, call.mask)), False


register(
    Backend(
        name="dense",
        preferences=(
            # ONNX's form of SDPA has no grouped heads, or no zeros for hidden rows.
            Preference(5, lambda call: not torch.onnx.is_in_onnx_export(), "it supports any length, and dropout"),
        ),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could, with a mask as large as a head's scores; it is for graphs of any length, and dropout",
    )
)
