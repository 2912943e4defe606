"""The Triton kernels of ``triton_decode.py``. It imports Triton, and is imported when it is first needed."""

# Kernels are traced, not called: what they take has the types of tl, and shape parameters are in capitals.
# ruff: noqa: ANN001, ANN201
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def narrow(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """To the dtype, rounded to nearest: a GPU does so by itself, the interpreter cuts bfloat16 off."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def attend(
    query,
    key,
    value,
    mask,
    bias,
    sums,  # (B·G, parts, rows, Dv), float32: this kernel's result, not divided
    states,  # (B·G, parts, rows, 2), float32: greatest score and sum of weights of each
    query_b,
    query_h,
    query_t,
    query_d,
    key_b,
    key_g,
    key_s,
    key_d,
    value_b,
    value_g,
    value_s,
    value_d,
    mask_b,
    mask_h,
    mask_t,
    mask_s,
    bias_b,
    bias_h,
    bias_t,
    bias_s,
    groups,
    group,
    queries,
    context,
    head_dim,
    value_dim,
    first_key,
    length,  # keys of a part
    scale,
    softcap,
    window,
    MASK: tl.constexpr,  # 0: none, 1: bool, 2: added
    BIAS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,  # the interpreter cannot multiply bfloat16: the same numbers are multiplied as float32
):
    """One part of the context of one KV head, for up to ROWS of its rows (query heads of the group × positions)."""
    head = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = head // groups
    g = head % groups
    rows = group * queries
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = row < rows
    h = (g * group + row // queries).to(tl.int64)
    t = (row % queries).to(tl.int64)
    d = tl.arange(0, WIDTH)
    e = tl.arange(0, VALUE_WIDTH)
    q = tl.load(
        query + b * query_b + h[:, None] * query_h + t[:, None] * query_t + d[None, :] * query_d,
        mask=real[:, None] & (d < head_dim)[None, :],
        other=0.0,
    )
    start = first_key + part * length
    stop = tl.minimum(start + length, context)
    own = t + context - queries
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    for at in range(start, stop, KEYS):
        j = (at + tl.arange(0, KEYS)).to(tl.int64)
        here = j < stop
        k = tl.load(
            key + b * key_b + g * key_g + j[None, :] * key_s + d[:, None] * key_d,
            mask=here[None, :] & (d < head_dim)[:, None],
            other=0.0,
        )
        if INTERPRETED:
            scores = tl.dot(q.to(tl.float32), k.to(tl.float32), input_precision="ieee") * scale
        else:
            scores = tl.dot(q, k, input_precision="ieee") * scale
        if SOFTCAP:
            # tanh x = 1 - 2 / (1 + e^2x), which needs no device library.
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(scores * (2.0 / softcap))))
        seen = real[:, None] & here[None, :]
        if BIAS:
            places = bias + b * bias_b + h[:, None] * bias_h + t[:, None] * bias_t + j[None, :] * bias_s
            scores += tl.load(places, mask=seen, other=0.0).to(tl.float32)
        if MASK:
            places = mask + b * mask_b + h[:, None] * mask_h + t[:, None] * mask_t + j[None, :] * mask_s
            if MASK == 1:
                seen = seen & (tl.load(places, mask=seen, other=0) != 0)
            else:
                scores += tl.load(places, mask=seen, other=0.0).to(tl.float32)
        if CAUSAL:
            seen = seen & (j[None, :] <= own[:, None])
        if WINDOW:
            seen = seen & (j[None, :] > own[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        now = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(now == float("-inf"), 0.0, now)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(top - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            value + b * value_b + g * value_g + j[:, None] * value_s + e[None, :] * value_d,
            mask=here[:, None] & (e < value_dim)[None, :],
            other=0.0,
        )
        weights = narrow(weights, v.dtype, INTERPRETED)
        if INTERPRETED:
            acc = acc * shrink[:, None] + tl.dot(weights.to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            acc = acc * shrink[:, None] + tl.dot(weights, v, input_precision="ieee")
        top = now
    place = (head * tl.num_programs(1) + part) * rows + row
    tl.store(sums + place[:, None] * value_dim + e[None, :], acc, mask=real[:, None] & (e < value_dim)[None, :])
    tl.store(states + place * 2, top, mask=real)
    tl.store(states + place * 2 + 1, total, mask=real)


@triton.jit
def merge(
    sums,
    states,
    out,  # (B·G, rows, Dv), which is (B, H, T, Dv)
    parts,
    rows,
    value_dim,
    PARTS: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The parts of one row, weighted by their log-sum-exps."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1)
    part = tl.arange(0, PARTS)
    e = tl.arange(0, VALUE_WIDTH)
    place = (head * parts + part) * rows + row
    top = tl.load(states + place * 2, mask=part < parts, other=float("-inf"))
    total = tl.load(states + place * 2 + 1, mask=part < parts, other=0.0)
    greatest = tl.max(top, 0)
    weight = tl.exp(top - tl.where(greatest == float("-inf"), 0.0, greatest))
    share = tl.load(
        sums + place[:, None] * value_dim + e[None, :],
        mask=(part < parts)[:, None] & (e < value_dim)[None, :],
        other=0.0,
    )
    whole = tl.sum(weight * total, 0)
    result = tl.sum(share * weight[:, None], 0) / tl.where(whole == 0.0, 1.0, whole)
    result = narrow(result, out.dtype.element_ty, INTERPRETED)
    tl.store(out + (head * rows + row) * value_dim + e, result, mask=e < value_dim)
