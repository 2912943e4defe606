"""The query heads of a group folded into the query length: each KV head is read once for its whole group.

The folded query is (B, G, R · T, D) with R = H / G, so that scores and sums are matrix products with the G KV heads,
and the cache is not repeated (Ainslie et al. 2023, section 2.2; Shazeer 2019, section 3). There are two routes:
PyTorch's fused kernel, and plain matrix products for what that does not support (soft cap, trained bias, another width
of the value) or where they are faster.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..call import Call
from ..cpu.build import has_short_vectors
from ..decoding import decodes_without_grad
from ..masks import addable, sum_of_extras
from ..registry import Backend, Preference, register

# Elements of scores, or of masks and biases, in memory at once: longer queries are divided into pieces.
_PIECE = 1 << 24
# Queries per piece if positions hide keys: short pieces skip more hidden keys, long pieces need fewer calls.
_ROWS = 256
# Elements of 16-bit keys or values that are widened to float32 at once, so that they stay in the processor's cache.
_WIDENED = 1 << 20
# Bytes of keys and values below which one fused call is faster than several small ones.
_MANY_BYTES = {torch.float32: 1 << 23, torch.bfloat16: 1 << 21, torch.float16: 1 << 19}
# Queries per block of PyTorch's fused kernel on CPUs, whose threads divide heads and blocks, nothing smaller.
_FUSED_BLOCK = 32
# Folded queries up to which the product with the keys on the left is faster: it reads memory in order.
_KEYS_LEFT = 32
# Query rows of a KV head from which decoding is bound by arithmetic on processors with short vectors.
_MANY_ROWS = 32


def unsupported_reason(call: Call) -> str | None:
    """The reason why this backend cannot serve a call, or None."""
    return "dropout is for the dense backend" if call.dropout else None


def run(call: Call) -> Tensor:
    """Attention with folded groups, in pieces if there are many queries.

    Returns:
        (B, H, T, Dv) in the query's dtype.
    """
    fused = is_fused(call)
    length = call.query_length
    rows = _rows_at_once(call, fused)
    piece = _fused if fused else _products
    if rows >= length:
        return piece(call, 0, length)
    return torch.cat([piece(call, start, min(start + rows, length)) for start in range(0, length, rows)], 2)


def is_fused(call: Call) -> bool:
    """Whether PyTorch's fused kernel supports the folded query, and is not slower than matrix products."""
    if call.softcap is not None or call.learns_scores:
        return False
    if call.query.device.type != "cpu":
        return True
    tensors = (call.query, call.key, call.value)
    if call.value_dim != call.head_dim or any(tensor.stride(-1) != 1 for tensor in tensors):
        return False
    if call.needs_grad or (call.query.element_size() == 2 and torch.compiler.is_compiling()):
        # A Python loop widens blocks: a compiler would compile again for every context.
        return True
    first, last = call.span(0, call.query_length)
    heads = call.batch * call.num_key_value_heads
    numbers = heads * (last - first) * (call.head_dim + call.value_dim)
    few = numbers * call.query.element_size() < _MANY_BYTES.get(call.query.dtype, 1 << 23)
    return few or not _products_win(call, heads)


def _products_win(call: Call, heads: int) -> bool:
    """Whether matrix products are faster on a CPU than the fused kernel (measured: docs/attention.md)."""
    rows = call.group * call.query_length
    if rows > _KEYS_LEFT:
        return False
    if call.query.dtype == torch.float16:
        return True
    if heads * -(-rows // _FUSED_BLOCK) < torch.get_num_threads():
        return call.query.dtype == torch.float32
    # The fused kernel multiplies matrix by vector slowly, but keeps its scores in cache.
    return rows == 1 if call.query.dtype == torch.bfloat16 else rows <= call.head_dim // 24


def _rows_at_once(call: Call, fused: bool) -> int:
    """Queries per piece, so that no piece needs more than _PIECE elements of scores, or of masks and biases."""
    length = call.query_length
    if length == 1:
        return 1
    columns = call.context * call.batch * call.num_heads
    by_position = call.needs_positions(0, length)
    if fused:
        added = [extra for extra in (call.mask, call.bias) if extra is not None]
        if not by_position and len(added) < 2 and all(_stays_a_view(call, extra) for extra in added):
            return length
        parts = max([extra.shape[0] for extra in added], default=1) * max(
            [extra.shape[1] for extra in added], default=1
        )
        columns = call.context * parts * (1 if _takes_groups(call) else call.group)
    rows = max(1, _PIECE // columns)
    return min(rows, _ROWS) if by_position else rows


def _takes_groups(call: Call) -> bool:
    """Whether the fused kernel supports grouped heads with a mask, without folding."""
    return call.query.device.type == "cpu"


def _stays_a_view(call: Call, extra: Tensor) -> bool:
    return _takes_groups(call) or _folds(extra, call.group, call.query_length)


def _folds(extra: Tensor, group: int, length: int) -> bool:
    """Whether a mask or bias of (b, h, t, s) is, as a view, one of (b, g, r · t, s)."""
    return group == 1 or (extra.shape[2] == 1 and (extra.shape[1] == 1 or length == 1))


def _part(tensor: Tensor, start: int, stop: int, first: int, last: int) -> Tensor:
    """The part of a mask or bias for some queries and keys; dimensions that broadcast are unchanged."""
    if tensor.shape[2] > 1:
        tensor = tensor[:, :, start:stop]
    return tensor[..., first:last] if tensor.shape[3] > 1 else tensor


def _grouped(tensor: Tensor, groups: int) -> Tensor:
    """A mask or bias as a view of (b, g, r, t, s): heads divided into groups, or broadcasting."""
    return tensor.unflatten(1, (groups, -1)) if tensor.shape[1] > 1 else tensor.unsqueeze(1)


def _fused(call: Call, start: int, stop: int) -> Tensor:
    """Queries ``start`` to ``stop`` by PyTorch's fused kernel."""
    B, G, R, T = call.batch, call.num_key_value_heads, call.group, stop - start
    first, last = call.span(start, stop)
    key, value = call.key[:, :, first:last], call.value[:, :, first:last]
    query = call.query[:, :, start:stop]
    extra = _sum_of_extras(call, start, stop)
    if extra is not None:
        extra = addable(extra, query.dtype)
    if R == 1 or (extra is not None and _takes_groups(call) and not _folds(extra, R, T)):
        if extra is not None:
            extra = extra.expand(-1, -1, T, last - first)
        return scaled_dot_product_attention(
            query, key, value, attn_mask=extra, scale=call.scale, enable_gqa=R > 1
        ).contiguous()
    if extra is not None:
        extra = _grouped(extra, G)
        if extra.shape[2:4] != (1, 1):
            # A view if it varies only along heads or only along queries; else, on GPUs, a copy as large as a piece.
            extra = extra.expand(-1, -1, R, T, -1)
        extra = extra.flatten(2, 3).expand(-1, -1, R * T, last - first)
    out = scaled_dot_product_attention(query.reshape(B, G, R * T, -1), key, value, attn_mask=extra, scale=call.scale)
    return out.contiguous().view(B, call.num_heads, T, -1)


def _sum_of_extras(call: Call, start: int, stop: int) -> Tensor | None:
    """The sum of mask, bias and positions of these queries, in four dimensions; bool if all are bool."""
    first, last = call.span(start, stop)
    visible = call.positions(start, stop)
    parts = [_part(extra, start, stop, first, last) for extra in (call.bias, call.mask) if extra is not None]
    return sum_of_extras(None if visible is None else visible[None, None], parts)


def _products(call: Call, start: int, stop: int) -> Tensor:
    """Queries ``start`` to ``stop`` by matrix products, scores in float32."""
    B, G, R, T = call.batch, call.num_key_value_heads, call.group, stop - start
    first, last = call.span(start, stop)
    key, value = call.key[:, :, first:last], call.value[:, :, first:last]
    wide = torch.float64 if call.query.dtype == torch.float64 else torch.float32
    query = (call.query[:, :, start:stop].to(wide) * call.scale).reshape(B, G, R * T, -1)
    scores = _scores(query, key)
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    visible = call.positions(start, stop)
    extras = [extra for extra in (call.bias, call.mask) if extra is not None]
    if extras or visible is not None:
        scores = scores.view(B, G, R, T, last - first)
        if visible is not None:
            scores = scores.masked_fill(~visible, float("-inf"))
        for extra in extras:
            part = _grouped(_part(extra, start, stop, first, last), G)
            scores = scores.masked_fill(~part, float("-inf")) if part.dtype == torch.bool else scores + part
        scores = scores.view(B, G, R * T, last - first)
    if not extras:
        out = _sums(torch.softmax(scores, -1), value)
    else:
        # A row without visible keys is all -inf, and its softmax would be NaN: here its exponentials sum to 0.
        top = scores.detach().amax(-1, keepdim=True)
        weights = torch.exp(scores - top.masked_fill(top == float("-inf"), 0.0))
        total = weights.sum(-1, keepdim=True)
        out = _sums(weights, value) / total.masked_fill(total == 0, 1.0)
    return out.to(call.query.dtype).view(B, call.num_heads, T, call.value_dim)


def _merges(tensor: Tensor) -> bool:
    """Whether batch and heads are one dimension of a view."""
    return 1 in tensor.shape[:2] or tensor.stride(0) == tensor.shape[1] * tensor.stride(1)


def _bmm(left: Tensor, right: Tensor) -> Tensor:
    """(B, G, m, k) by (B, G, k, n), without the copy that torch.matmul makes of operands that do not merge."""
    if _merges(left) and _merges(right):
        return torch.bmm(left.flatten(0, 1), right.flatten(0, 1)).unflatten(0, left.shape[:2])
    axis = 0 if left.shape[0] <= left.shape[1] else 1
    pairs = zip(left.unbind(axis), right.unbind(axis), strict=True)
    return torch.stack([torch.bmm(a, b) for a, b in pairs], axis)


def _blocks(tensor: Tensor) -> tuple[int, int]:
    """Sequences, and keys of each, that are widened at once."""
    _, heads, keys, width = tensor.shape
    most = max(1, _WIDENED // (heads * width))
    return max(1, most // keys), min(most, keys)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """(B, G, n, D) by (B, G, S, D) to (B, G, n, S) in the query's dtype; 16-bit keys are widened in blocks."""
    if key.dtype != query.dtype:
        sequences, keys = _blocks(key)
        rows = []
        for queries, part in zip(query.split(sequences), key.split(sequences), strict=True):
            rows.append(torch.cat([_scores(queries, block.to(query.dtype)) for block in part.split(keys, 2)], -1))
        return torch.cat(rows)
    if query.shape[2] <= _KEYS_LEFT:
        return _bmm(key, query.transpose(-1, -2)).transpose(-1, -2).contiguous()
    return _bmm(query, key.transpose(-1, -2))


def _sums(weights: Tensor, value: Tensor) -> Tensor:
    """(B, G, n, S) by (B, G, S, Dv) to (B, G, n, Dv) in the weights' dtype; 16-bit values are widened in blocks."""
    if value.dtype == weights.dtype:
        return _bmm(weights, value)
    sequences, keys = _blocks(value)
    rows = []
    for part, values in zip(weights.split(sequences), value.split(sequences), strict=True):
        blocks = zip(part.split(keys, 3), values.split(keys, 2), strict=True)
        products = [_bmm(some, block.to(weights.dtype)) for some, block in blocks]
        rows.append(products[0] if len(products) == 1 else torch.stack(products).sum(0))
    return torch.cat(rows)


def _beats_cpu_kernel(call: Call) -> bool:
    """Whether PyTorch's fused kernel decodes faster than the compiled one (measured: docs/benchmarks.md).

    It multiplies faster on AVX2, and gives whole KV heads to its threads.
    """
    if not decodes_without_grad(call, "cpu"):
        return False
    heads = call.batch * call.num_key_value_heads
    if call.group * call.query_length < _MANY_ROWS or heads < 2 * torch.get_num_threads():
        return False
    return has_short_vectors() and is_fused(call)


register(
    Backend(
        name="packed",
        preferences=(
            Preference(
                60,
                _beats_cpu_kernel,
                "so many query heads share a KV head that arithmetic takes longer than reading",
            ),
            Preference(10, lambda call: not call.any_size, "it serves every call without repeating KV heads"),
        ),
        unsupported_reason=unsupported_reason,
        run=run,
        not_preferred="it could, but is not the fastest for this call",
    )
)
