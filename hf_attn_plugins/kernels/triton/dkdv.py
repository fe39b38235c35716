"""Backward, second pass: dK and dV. One program per tile of keys and key head goes over the query rows."""

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
    tile_limits,
    tile_plan,
)
from hf_attn_plugins.kernels.triton.tiles import NO_BIAS, count_steps, dropout_scale, load_tile, step_start, store_tile


@triton.jit
def dkdv_range(
    d_key, d_value, key, value, query_base, grad_base, row_lse, delta, strides, limits, keys, head, group_size,
    num_rows, piece, labels, bias, bias_strides, scale, softcap, dropout, drops,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    LABELS: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO of a range of rows: of its masked tiles if MASKED, else of its whole ones.

    The rows are those of `group_size` heads from `head` on. One loop goes over heads and rows: for two nested loops the
    compiler computes so many addresses ahead that registers spill.
    """
    stride_query_h, stride_query, stride_query_dim, stride_grad_h, stride_grad, stride_grad_dim = strides
    stride_bias_h, stride_bias_t, stride_bias_s = bias_strides
    row_end = piece[1]
    begin, whole_begin, whole_end, end = limits
    steps = count_steps(begin, whole_begin, whole_end, end, not MASKED, BLOCK_M)
    for turn in range(steps * group_size):
        group = turn // steps
        start = step_start(turn - group * steps, begin, whole_begin, whole_end, not MASKED, BLOCK_M)
        group_64 = tl.cast(group, tl.int64)
        query = load_tile(
            query_base + group_64 * stride_query_h, start, stride_query, stride_query_dim, row_end, MASKED, HEAD_DIM,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
        grad_out = load_tile(
            grad_base + group_64 * stride_grad_h, start, stride_grad, stride_grad_dim, row_end, MASKED, HEAD_DIM_V,
            BLOCK_M, BLOCK_DV,
        )  # fmt: skip
        skip = group_64 * tl.cast(num_rows, tl.int64)
        tile_lse, tile_delta = load_row_numbers(
            row_lse + skip, delta + skip, start + tl.arange(0, BLOCK_M), row_end, MASKED
        )
        rows = start + tl.arange(0, BLOCK_M)[None, :]
        bias_rows = bias
        if BIAS != NO_BIAS:
            bias_rows = bias + group_64 * stride_bias_h + tl.cast(rows, tl.int64) * stride_bias_t
        # Tiles are transposed, (keys, rows): P^T and dS^T are then left operands and stay in registers.
        weights, slope = weights_and_slope(
            tl.dot(key, tl.trans(query), input_precision=PRECISION), rows, keys, tile_lse[None, :], piece, labels,
            bias_rows, stride_bias_s, scale, softcap, MASKED, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS, BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        d_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        kept = weights
        if HAS_DROPOUT:
            drawn = dropout_scale(rows, keys, head + group, drops, dropout)
            kept = weights * drawn
            d_weights = d_weights * drawn
        d_value = tl.dot(kept.to(grad_out.dtype), grad_out, d_value, input_precision=PRECISION)
        d_scores = weights * (d_weights - tile_delta[None, :]) * slope
        d_key = tl.dot(d_scores.to(query.dtype), query, d_key, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def dkdv_kernel(
    query, key, value, grad_out, row_lse, delta, d_key, d_value, row_labels, key_labels, bounds, plan, bias,
    offset_pointer, row_hashes, key_hashes,
    stride_query_b, stride_query_h, stride_query_t, stride_query_d,
    stride_key_b, stride_key_h, stride_key_s, stride_key_d,
    stride_value_b, stride_value_h, stride_value_s, stride_value_d,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_grad_d,
    stride_dk_b, stride_dk_h, stride_dk_s, stride_dk_d,
    stride_dv_b, stride_dv_h, stride_dv_s, stride_dv_d,
    stride_row_labels, stride_key_labels, stride_bounds_b, stride_bounds_tile, stride_plan_b, stride_plan_tile,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    num_rows, num_keys, num_heads, group_size, num_pieces, offset, left, right, scale, softcap, dropout,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, LABELS: tl.constexpr,
    HAS_PLAN: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N keys of dK (B, Hkv, S, D) and dV (B, Hkv, S, Dv), summed over the heads that share them.

    `bounds` and `plan` belong to tiles of keys here: they say which rows see each tile.
    """
    tile, first, last, kv_head, batch = program_tile(num_keys, num_heads // group_size, False, BLOCK_N)
    head = kv_head * group_size
    keys = first + tl.arange(0, BLOCK_N)[:, None]
    shift = load_offset(offset, offset_pointer, HAS_OFFSET)
    drops = batch_hashes(row_hashes, key_hashes, batch, num_rows, num_keys, num_heads, HAS_DROPOUT)
    labels = batch_labels(row_labels, key_labels, stride_row_labels, stride_key_labels, batch, LABELS)
    limits = tile_limits(bounds, stride_bounds_b, stride_bounds_tile, batch, tile, num_rows, LABELS)
    plan = tile_plan(plan, stride_plan_b, stride_plan_tile, batch, tile, HAS_PLAN)
    if BIAS != NO_BIAS:
        bias = head_pointer(bias, batch, head, stride_bias_b, stride_bias_h)
    bias_strides = (stride_bias_h, stride_bias_t, stride_bias_s)
    query = head_pointer(query, batch, head, stride_query_b, stride_query_h)
    grad_out = head_pointer(grad_out, batch, head, stride_grad_b, stride_grad_h)
    key = head_pointer(key, batch, kv_head, stride_key_b, stride_key_h)
    value = head_pointer(value, batch, kv_head, stride_value_b, stride_value_h)
    d_key = head_pointer(d_key, batch, kv_head, stride_dk_b, stride_dk_h)
    d_value = head_pointer(d_value, batch, kv_head, stride_dv_b, stride_dv_h)
    row_lse += (batch * num_heads + head) * num_rows
    delta += (batch * num_heads + head) * num_rows
    strides = (stride_query_h, stride_query_t, stride_query_d, stride_grad_h, stride_grad_t, stride_grad_d)
    k = load_tile(key, first, stride_key_s, stride_key_d, num_keys, True, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_tile(value, first, stride_value_s, stride_value_d, num_keys, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_DV), 0.0, tl.float32)
    for index in range(num_pieces if HAS_PLAN else 1):
        held = load_piece(plan, index, num_keys, num_rows, left, right, shift, HAS_PLAN)
        key_begin, key_end, row_begin, row_end, piece_left, piece_right, piece_shift = held
        # `piece_range` puts the held side first. Seen from a key, shift changes its sign, and left and right swap.
        turned = (key_begin, key_end, row_begin, row_end, piece_right, piece_left, -piece_shift)
        reach = piece_range(first, last, turned, limits, HAS_RIGHT, HAS_LEFT, HAS_PLAN, BIAS, BLOCK_M)
        piece = (row_begin, row_end, key_begin, key_end, piece_left, piece_right, piece_shift)
        for MASKED in tl.static_range(1 if BIAS != NO_BIAS else 0, 2):  # the whole tiles, then the others
            dk, dv = dkdv_range(
                dk, dv, k, v, query, grad_out, row_lse, delta, strides, reach, keys, head, group_size, num_rows, piece,
                labels, bias, bias_strides, scale, softcap, dropout, drops, MASKED == 1, HAS_LEFT, HAS_RIGHT, HAS_PLAN,
                LABELS, BIAS, HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION,
            )  # fmt: skip
    store_tile(d_key, dk * scale, first, stride_dk_s, stride_dk_d, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(d_value, dv, first, stride_dv_s, stride_dv_d, num_keys, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
