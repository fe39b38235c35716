"""The forward kernel: one program per tile of query rows and head walks over the keys those rows see.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 1, with scores in units of log 2.
"""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.kernels.triton_tiles import (
    BOTH_LABELS,
    LOG2_E,
    NO_BIAS,
    NO_LABELS,
    count_steps,
    keep,
    load_bias,
    load_bounds,
    load_piece,
    load_tile,
    span,
    step_start,
    store_lse,
    store_tile,
    tanh,
    visible,
)


@triton.jit
def accumulate(
    acc, total, top, query, key_base, value_base, strides, limits, rows, heads, piece, shift, row_labels,
    key_labels, bias_rows, stride_bias, scale, softcap, dropout, seed,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    LABELS: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile of rows over the whole or the masked tiles of some keys (see `span`).

    `rows` and `heads` are (rows, 1); `acc` is out times `total`, `total` the sum of 2**(scores - top).
    """
    stride_key, stride_key_dim, stride_value, stride_value_dim = strides
    row_begin, row_end, key_begin, key_end, left, right = piece
    begin, whole_begin, whole_end, end = limits
    for step in range(count_steps(begin, whole_begin, whole_end, end, not MASKED, BLOCK_N)):
        start = step_start(step, begin, whole_begin, whole_end, not MASKED, BLOCK_N)
        key = load_tile(key_base, start, stride_key, stride_key_dim, key_end, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        factor = scale * LOG2_E
        if HAS_SOFTCAP:
            scores = tanh(scores * (scale / softcap)) * (softcap * LOG2_E)
            factor = 1.0
        if BIAS != NO_BIAS:
            inside = (rows < row_end) & (keys < key_end)
            scores = scores * factor + load_bias(bias_rows, stride_bias, keys, inside, BIAS) * LOG2_E
            factor = 1.0
        if MASKED:
            seen = visible(
                rows, keys, row_begin, row_end, key_begin, key_end, shift, left, right, row_labels, key_labels,
                HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS,
            )  # fmt: skip
            scores = tl.where(seen, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        # Rows that saw nothing yet: exp2(-inf - 0) = 0 where exp2(-inf + inf) would be NaN.
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores * factor - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(weights, 1)
        if HAS_DROPOUT:
            weights = weights * keep(rows, keys, heads, seed, dropout)
        value = load_tile(
            value_base, start, stride_value, stride_value_dim, key_end, MASKED, HEAD_DIM_V, BLOCK_N, BLOCK_DV
        )
        acc = tl.dot(weights.to(value.dtype), value, acc * fade[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit
def walk(
    acc, total, top, query, key_base, value_base, strides, rows, heads, low, high, piece, limits, shift, row_labels,
    key_labels, bias_rows, stride_bias, scale, softcap, dropout, seed,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr, LABELS: tl.constexpr,
    BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """`accumulate` over one piece: the tiles before the whole ones with a mask, those without, and those after."""
    row_begin, row_end, key_begin, key_end, left, right = piece
    begin, whole_begin, whole_end, end = span(
        tl.maximum(low, row_begin), tl.minimum(high, row_end - 1), shift, left, right, key_begin, key_end, limits,
        HAS_LEFT, HAS_RIGHT, BLOCK_N,
    )  # fmt: skip
    if HAS_PLAN:  # a tile that sticks out of its piece needs a mask everywhere
        inside = (low >= row_begin) & (high < row_end)
        end = tl.where(row_begin > high, begin, end)
        whole_begin, whole_end = tl.where(inside, whole_begin, begin), tl.where(inside, whole_end, begin)
    if BIAS != NO_BIAS:
        whole_begin, whole_end = begin, begin
    for MASKED in tl.static_range(1 if BIAS != NO_BIAS else 0, 2):  # the whole tiles, then the others
        acc, total, top = accumulate(
            acc, total, top, query, key_base, value_base, strides,
            (begin, whole_begin, whole_end, end), rows, heads, piece, shift, row_labels, key_labels,
            bias_rows, stride_bias, scale, softcap, dropout, seed, MASKED == 1,
            HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS, BIAS, HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D,
            BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip
    return acc, total, top


@triton.jit
def forward_kernel(
    query, key, value, out, lse, row_lse, row_labels, key_labels, bounds, plan, bias, offset_pointer, seed_pointer,
    stride_query_b, stride_query_h, stride_query_t, stride_query_d,
    stride_key_b, stride_key_h, stride_key_s, stride_key_d,
    stride_value_b, stride_value_h, stride_value_s, stride_value_d,
    stride_out_b, stride_out_h, stride_out_t, stride_out_d,
    stride_row_labels, stride_key_labels, stride_bounds_b, stride_bounds_tile, stride_plan_b, stride_plan_tile,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    num_rows, num_keys, num_heads, groups, num_pieces, offset, left, right, scale, softcap, dropout,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, LABELS: tl.constexpr,
    HAS_PLAN: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out (B, H, T, Dv), lse (B, H, T) and row_lse (see `store_lse`), a tile of BLOCK_M rows each."""
    tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    tile, batch_head = program % tiles, program // tiles
    if HAS_RIGHT:
        tile = tiles - 1 - tile  # the last rows of a causal mask have most to do: start them first
    head, batch = batch_head % num_heads, tl.cast(batch_head // num_heads, tl.int64)
    kv_head = tl.cast(head // groups, tl.int64)
    first = tile * BLOCK_M
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    shift = offset
    if HAS_OFFSET:
        shift = tl.load(offset_pointer).to(tl.int32)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_pointer)
    if LABELS != NO_LABELS:
        key_labels += batch * stride_key_labels
    if LABELS == BOTH_LABELS:
        row_labels += batch * stride_row_labels
    query += batch * stride_query_b + tl.cast(head, tl.int64) * stride_query_h
    key += batch * stride_key_b + kv_head * stride_key_h
    value += batch * stride_value_b + kv_head * stride_value_h
    bias_rows = bias
    if BIAS != NO_BIAS:
        bias_rows = bias + batch * stride_bias_b + head * stride_bias_h + tl.cast(rows, tl.int64) * stride_bias_t
    query_tile = load_tile(query, first, stride_query_t, stride_query_d, num_rows, True, HEAD_DIM, BLOCK_M, BLOCK_D)

    strides = (stride_key_s, stride_key_d, stride_value_s, stride_value_d)
    if LABELS != NO_LABELS:
        bounds += batch * stride_bounds_b + tl.cast(tile, tl.int64) * stride_bounds_tile
    limits = load_bounds(bounds, num_keys, LABELS != NO_LABELS)
    if HAS_PLAN:
        plan += batch * stride_plan_b + tl.cast(tile, tl.int64) * stride_plan_tile
    acc = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    total = tl.full((BLOCK_M,), 0.0, tl.float32)
    top = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    high = tl.minimum(first + BLOCK_M, num_rows) - 1
    # One piece without a plan: the loop is then a single unrolled pass.
    for index in range(num_pieces if HAS_PLAN else 1):
        piece = load_piece(plan, index, num_rows, num_keys, left, right, HAS_PLAN)
        acc, total, top = walk(
            acc, total, top, query_tile, key, value, strides, rows, head, first, high, piece, limits, shift, row_labels,
            key_labels, bias_rows, stride_bias_s, scale, softcap, dropout, seed, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS,
            BIAS, HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip

    seen = total > 0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    out += batch * stride_out_b + tl.cast(head, tl.int64) * stride_out_h
    store_tile(out, acc, first, stride_out_t, stride_out_d, num_rows, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    row = first + tl.arange(0, BLOCK_M)
    store_lse(lse, row_lse, tl.cast(batch_head, tl.int64) * num_rows + row, top, total, row < num_rows)
