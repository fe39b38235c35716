"""The forward kernel: one program per tile of query rows and head goes over the keys that these rows see.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 1, with scores in units of log 2.
"""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.kernels.triton.program import (
    batch_hashes,
    batch_labels,
    head_pointer,
    load_offset,
    load_piece,
    piece_range,
    program_tile,
    row_bias,
    tile_limits,
    tile_plan,
)
from hf_attn_plugins.kernels.triton.tiles import (
    LOG2_E,
    NO_BIAS,
    count_steps,
    describe,
    dropout_scale,
    fetch,
    load_bias,
    load_tile,
    step_start,
    store_lse,
    store_tile,
    tanh,
    visible,
)


@triton.jit
def accumulate(
    acc, row_sum, row_max, query, key_base, value_base, strides, limits, rows, heads, piece, labels, bias_rows,
    stride_bias, scale, softcap, dropout, drops,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    LABELS: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Online softmax of a tile of rows over a range of keys: over its masked tiles if MASKED, else over its whole ones.

    `limits` is the range, as `key_range` returns it. `rows` and `heads` are (rows, 1). With scores in units of log 2:
    `row_sum` is the sum of 2**(scores - row_max), and `acc` is out * row_sum.
    """
    stride_key, stride_key_dim, stride_value, stride_value_dim = strides
    row_end, key_end = piece[1], piece[3]
    begin, whole_begin, whole_end, end = limits
    for step in range(count_steps(begin, whole_begin, whole_end, end, not MASKED, BLOCK_N)):
        start = step_start(step, begin, whole_begin, whole_end, not MASKED, BLOCK_N)
        key = fetch(key_base, start, stride_key, stride_key_dim, key_end, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D, TMA)
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
            seen = visible(rows, keys, piece, labels, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS)
            scores = tl.where(seen, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * factor)
        # For rows that saw no key yet: exp2(-inf - 0) is 0, but exp2(-inf + inf) would be NaN.
        score_shift = tl.where(new_max == -float("inf"), 0.0, new_max)
        weights = tl.exp2(scores * factor - score_shift[:, None])
        rescale = tl.exp2(row_max - score_shift)
        row_sum = row_sum * rescale + tl.sum(weights, 1)
        if HAS_DROPOUT:
            weights = weights * dropout_scale(rows, keys, heads, drops, dropout)
        value = fetch(
            value_base, start, stride_value, stride_value_dim, key_end, MASKED, HEAD_DIM_V, BLOCK_N, BLOCK_DV, TMA
        )
        acc = tl.dot(weights.to(value.dtype), value, acc * rescale[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def accumulate_piece(
    acc, row_sum, row_max, query, key_base, value_base, strides, rows, heads, low, high, piece, limits, labels,
    bias_rows, stride_bias, scale, softcap, dropout, drops,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr, LABELS: tl.constexpr,
    BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr, HEAD_DIM: tl.constexpr,
    HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`accumulate` over one piece: first its whole tiles, without a mask, then the tiles before and after them."""
    limits = piece_range(low, high, piece, limits, HAS_LEFT, HAS_RIGHT, HAS_PLAN, BIAS, BLOCK_N)
    for MASKED in tl.static_range(1 if BIAS != NO_BIAS else 0, 2):
        acc, row_sum, row_max = accumulate(
            acc, row_sum, row_max, query, key_base, value_base, strides, limits, rows, heads, piece, labels, bias_rows,
            stride_bias, scale, softcap, dropout, drops, MASKED == 1, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS, BIAS,
            HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
    return acc, row_sum, row_max


@triton.jit
def forward_kernel(
    query, key, value, out, lse, row_lse, row_labels, key_labels, bounds, plan, bias, offset_pointer,
    row_hashes, key_hashes,
    stride_query_b, stride_query_h, stride_query_t, stride_query_d,
    stride_key_b, stride_key_h, stride_key_s, stride_key_d,
    stride_value_b, stride_value_h, stride_value_s, stride_value_d,
    stride_out_b, stride_out_h, stride_out_t, stride_out_d,
    stride_row_labels, stride_key_labels, stride_bounds_b, stride_bounds_tile, stride_plan_b, stride_plan_tile,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    num_rows, num_keys, num_heads, group_size, num_pieces, offset, left, right, scale, softcap, dropout,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, LABELS: tl.constexpr,
    HAS_PLAN: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of out (B, H, T, Dv), lse (B, H, T) and row_lse (B, H, T; see `store_lse`)."""
    tile, first, last, head, batch = program_tile(num_rows, num_heads, HAS_RIGHT, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    shift = load_offset(offset, offset_pointer, HAS_OFFSET)
    drops = batch_hashes(row_hashes, key_hashes, batch, num_rows, num_keys, num_heads, HAS_DROPOUT)
    labels = batch_labels(row_labels, key_labels, stride_row_labels, stride_key_labels, batch, LABELS)
    limits = tile_limits(bounds, stride_bounds_b, stride_bounds_tile, batch, tile, num_keys, LABELS)
    plan = tile_plan(plan, stride_plan_b, stride_plan_tile, batch, tile, HAS_PLAN)
    bias_rows = row_bias(bias, batch, head, rows, stride_bias_b, stride_bias_h, stride_bias_t, BIAS)
    query = head_pointer(query, batch, head, stride_query_b, stride_query_h)
    key = head_pointer(key, batch, head // group_size, stride_key_b, stride_key_h)
    value = head_pointer(value, batch, head // group_size, stride_value_b, stride_value_h)
    if TMA:
        key = describe(key, num_keys, stride_key_s, HEAD_DIM, BLOCK_N, BLOCK_D)
        value = describe(value, num_keys, stride_value_s, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
    strides = (stride_key_s, stride_key_d, stride_value_s, stride_value_d)
    query_tile = load_tile(query, first, stride_query_t, stride_query_d, num_rows, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    acc = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    # Without a plan there is one piece, and the compiler unrolls the loop.
    for index in range(num_pieces if HAS_PLAN else 1):
        piece = load_piece(plan, index, num_rows, num_keys, left, right, shift, HAS_PLAN)
        acc, row_sum, row_max = accumulate_piece(
            acc, row_sum, row_max, query_tile, key, value, strides, rows, head, first, last, piece, limits, labels,
            bias_rows, stride_bias_s, scale, softcap, dropout, drops, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS, BIAS,
            HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip

    seen = row_sum > 0
    acc = acc / tl.where(seen, row_sum, 1.0)[:, None]
    out = head_pointer(out, batch, head, stride_out_b, stride_out_h)
    store_tile(out, acc, first, stride_out_t, stride_out_d, num_rows, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    row = first + tl.arange(0, BLOCK_M)
    store_lse(lse, row_lse, (batch * num_heads + head) * num_rows + row, row_max, row_sum, row < num_rows)
