"""Backward, first pass: dQ. One program per tile of query rows and head goes over the keys."""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.kernels.triton.backward import load_row_numbers, weights_and_slope
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
from hf_attn_plugins.kernels.triton.tiles import NO_BIAS, count_steps, dropout_scale, load_tile, step_start, store_tile


@triton.jit
def dq_range(
    acc, query, grad_out, row_lse, row_delta, key_base, value_base, strides, limits, rows, head, piece, labels,
    bias_rows, stride_bias, scale, softcap, dropout, drops,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    LABELS: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS K of a range of keys to `acc` (dQ without the scale): its masked tiles if MASKED, else its whole ones."""
    stride_key, stride_key_dim, stride_value, stride_value_dim = strides
    key_end = piece[3]
    begin, whole_begin, whole_end, end = limits
    for step in range(count_steps(begin, whole_begin, whole_end, end, not MASKED, BLOCK_N)):
        start = step_start(step, begin, whole_begin, whole_end, not MASKED, BLOCK_N)
        key = load_tile(key_base, start, stride_key, stride_key_dim, key_end, MASKED, HEAD_DIM, BLOCK_N, BLOCK_D)
        value = load_tile(
            value_base, start, stride_value, stride_value_dim, key_end, MASKED, HEAD_DIM_V, BLOCK_N, BLOCK_DV
        )
        keys = start + tl.arange(0, BLOCK_N)[None, :]
        weights, slope = weights_and_slope(
            tl.dot(query, tl.trans(key), input_precision=PRECISION), rows, keys, row_lse[:, None], piece, labels,
            bias_rows, stride_bias, scale, softcap, MASKED, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS, BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        d_weights = tl.dot(grad_out, tl.trans(value), input_precision=PRECISION)
        if HAS_DROPOUT:
            d_weights = d_weights * dropout_scale(rows, keys, head, drops, dropout)
        d_scores = weights * (d_weights - row_delta[:, None]) * slope
        acc = tl.dot(d_scores.to(key.dtype), key, acc, input_precision=PRECISION)
    return acc


@triton.jit
def dq_kernel(
    query, key, value, grad_out, row_lse, delta, d_query, row_labels, key_labels, bounds, plan, bias, offset_pointer,
    row_hashes, key_hashes,
    stride_query_b, stride_query_h, stride_query_t, stride_query_d,
    stride_key_b, stride_key_h, stride_key_s, stride_key_d,
    stride_value_b, stride_value_h, stride_value_s, stride_value_d,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_grad_d,
    stride_dq_b, stride_dq_h, stride_dq_t, stride_dq_d,
    stride_row_labels, stride_key_labels, stride_bounds_b, stride_bounds_tile, stride_plan_b, stride_plan_tile,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    num_rows, num_keys, num_heads, group_size, num_pieces, offset, left, right, scale, softcap, dropout,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, LABELS: tl.constexpr,
    HAS_PLAN: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of dQ (B, H, T, D)."""
    tile, first, last, head, batch = program_tile(num_rows, num_heads, HAS_RIGHT, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)[:, None]
    shift = load_offset(offset, offset_pointer, HAS_OFFSET)
    drops = batch_hashes(row_hashes, key_hashes, batch, num_rows, num_keys, num_heads, HAS_DROPOUT)
    labels = batch_labels(row_labels, key_labels, stride_row_labels, stride_key_labels, batch, LABELS)
    limits = tile_limits(bounds, stride_bounds_b, stride_bounds_tile, batch, tile, num_keys, LABELS)
    plan = tile_plan(plan, stride_plan_b, stride_plan_tile, batch, tile, HAS_PLAN)
    bias_rows = row_bias(bias, batch, head, rows, stride_bias_b, stride_bias_h, stride_bias_t, BIAS)
    query = head_pointer(query, batch, head, stride_query_b, stride_query_h)
    grad_out = head_pointer(grad_out, batch, head, stride_grad_b, stride_grad_h)
    d_query = head_pointer(d_query, batch, head, stride_dq_b, stride_dq_h)
    key = head_pointer(key, batch, head // group_size, stride_key_b, stride_key_h)
    value = head_pointer(value, batch, head // group_size, stride_value_b, stride_value_h)
    strides = (stride_key_s, stride_key_d, stride_value_s, stride_value_d)
    q = load_tile(query, first, stride_query_t, stride_query_d, num_rows, True, HEAD_DIM, BLOCK_M, BLOCK_D)
    g = load_tile(grad_out, first, stride_grad_t, stride_grad_d, num_rows, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    skip = (batch * num_heads + head) * num_rows
    tile_lse, tile_delta = load_row_numbers(row_lse + skip, delta + skip, first + tl.arange(0, BLOCK_M), num_rows, True)
    acc = tl.full((BLOCK_M, BLOCK_D), 0.0, tl.float32)
    for index in range(num_pieces if HAS_PLAN else 1):
        piece = load_piece(plan, index, num_rows, num_keys, left, right, shift, HAS_PLAN)
        reach = piece_range(first, last, piece, limits, HAS_LEFT, HAS_RIGHT, HAS_PLAN, BIAS, BLOCK_N)
        for MASKED in tl.static_range(1 if BIAS != NO_BIAS else 0, 2):  # the whole tiles, then the others
            acc = dq_range(
                acc, q, g, tile_lse, tile_delta, key, value, strides, reach, rows, head, piece, labels, bias_rows,
                stride_bias_s, scale, softcap, dropout, drops, MASKED == 1, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS, BIAS,
                HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
            )  # fmt: skip
    store_tile(d_query, acc * scale, first, stride_dq_t, stride_dq_d, num_rows, HEAD_DIM, BLOCK_M, BLOCK_D)
