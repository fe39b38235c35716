"""Backward, second pass: dK and dV, one program per tile of keys and key head, walking over query rows."""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.kernels.triton_backward import load_row_numbers, weights_and_slope
from hf_attn_plugins.kernels.triton_tiles import (
    BOTH_LABELS,
    NO_BIAS,
    NO_LABELS,
    count_steps,
    keep,
    load_bounds,
    load_piece,
    load_tile,
    span,
    step_start,
    store_tile,
)


@triton.jit
def dkdv_range(
    d_key, d_value, key, value, query_base, grad_base, row_lse, delta, strides, limits, keys, head, groups, piece,
    shift, row_labels, key_labels, bias, bias_strides, scale, softcap, dropout, seed,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    LABELS: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add dS^T Q and P^T dO over the whole or the masked tiles of some rows, of `groups` heads from `head` on.

    One flat loop over heads and rows: nested ones make the compiler keep so many addresses that it spills.
    """
    stride_query_h, stride_query, stride_query_dim, stride_grad_h, stride_grad, stride_grad_dim = strides
    stride_bias_h, stride_bias_t, stride_bias_s = bias_strides
    num_rows, row_end = tl.cast(piece[6], tl.int64), piece[1]
    begin, whole_begin, whole_end, end = limits
    steps = count_steps(begin, whole_begin, whole_end, end, not MASKED, BLOCK_M)
    for turn in range(steps * groups):
        group = turn // steps
        start = step_start(turn - group * steps, begin, whole_begin, whole_end, not MASKED, BLOCK_M)
        wide = tl.cast(group, tl.int64)
        query = load_tile(
            query_base + wide * stride_query_h, start, stride_query, stride_query_dim, row_end, MASKED, HEAD_DIM,
            BLOCK_M, BLOCK_D,
        )  # fmt: skip
        grad_out = load_tile(
            grad_base + wide * stride_grad_h, start, stride_grad, stride_grad_dim, row_end, MASKED, HEAD_DIM_V, BLOCK_M,
            BLOCK_DV,
        )  # fmt: skip
        skip = wide * num_rows
        tile_lse, tile_delta = load_row_numbers(
            row_lse + skip, delta + skip, start + tl.arange(0, BLOCK_M), row_end, MASKED
        )
        rows = start + tl.arange(0, BLOCK_M)[None, :]
        bias_rows = bias
        if BIAS != NO_BIAS:
            bias_rows = bias + wide * stride_bias_h + tl.cast(rows, tl.int64) * stride_bias_t
        # Transposed tiles (keys, rows): P^T and dS^T are then left operands straight from registers.
        weights, slope = weights_and_slope(
            tl.dot(key, tl.trans(query), input_precision=PRECISION), rows, keys, tile_lse[None, :], piece, shift,
            row_labels, key_labels, bias_rows, stride_bias_s, scale, softcap, MASKED, HAS_LEFT, HAS_RIGHT, HAS_PLAN,
            LABELS, BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        d_weights = tl.dot(value, tl.trans(grad_out), input_precision=PRECISION)
        kept = weights
        if HAS_DROPOUT:
            drawn = keep(rows, keys, head + group, seed, dropout)
            kept = weights * drawn
            d_weights = d_weights * drawn
        d_value = tl.dot(kept.to(grad_out.dtype), grad_out, d_value, input_precision=PRECISION)
        d_scores = weights * (d_weights - tile_delta[None, :]) * slope
        d_key = tl.dot(d_scores.to(query.dtype), query, d_key, input_precision=PRECISION)
    return d_key, d_value


@triton.jit
def dkdv_kernel(
    query, key, value, grad_out, row_lse, delta, d_key, d_value, row_labels, key_labels, bounds, plan, bias,
    offset_pointer, seed_pointer,
    stride_query_b, stride_query_h, stride_query_t, stride_query_d,
    stride_key_b, stride_key_h, stride_key_s, stride_key_d,
    stride_value_b, stride_value_h, stride_value_s, stride_value_d,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_grad_d,
    stride_dk_b, stride_dk_h, stride_dk_s, stride_dk_d,
    stride_dv_b, stride_dv_h, stride_dv_s, stride_dv_d,
    stride_row_labels, stride_key_labels, stride_bounds_b, stride_bounds_tile, stride_plan_b, stride_plan_tile,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    num_rows, num_keys, num_heads, groups, num_pieces, offset, left, right, scale, softcap, dropout,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, LABELS: tl.constexpr,
    HAS_PLAN: tl.constexpr, BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dK (B, Hkv, S, D) and dV (B, Hkv, S, Dv), a tile of BLOCK_N keys each, summed over the heads that share them.

    `bounds` and `plan` are those of the key tiles here: which rows each of them has to visit.
    """
    tiles = (num_keys + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    tile, batch_head = program % tiles, program // tiles
    kv_heads = num_heads // groups
    kv_head, batch = batch_head % kv_heads, tl.cast(batch_head // kv_heads, tl.int64)
    wide_head = tl.cast(kv_head, tl.int64)
    first = tile * BLOCK_N
    high = tl.minimum(first + BLOCK_N, num_keys) - 1
    keys = first + tl.arange(0, BLOCK_N)[:, None]
    shift = offset
    if HAS_OFFSET:
        shift = tl.load(offset_pointer).to(tl.int32)
    seed = 0
    if HAS_DROPOUT:
        seed = tl.load(seed_pointer)
    if LABELS != NO_LABELS:
        key_labels += batch * stride_key_labels
        bounds += batch * stride_bounds_b + tl.cast(tile, tl.int64) * stride_bounds_tile
    if LABELS == BOTH_LABELS:
        row_labels += batch * stride_row_labels
    limits = load_bounds(bounds, num_rows, LABELS != NO_LABELS)
    if HAS_PLAN:
        plan += batch * stride_plan_b + tl.cast(tile, tl.int64) * stride_plan_tile
    key += batch * stride_key_b + wide_head * stride_key_h
    value += batch * stride_value_b + wide_head * stride_value_h
    d_key += batch * stride_dk_b + wide_head * stride_dk_h
    d_value += batch * stride_dv_b + wide_head * stride_dv_h
    k = load_tile(key, first, stride_key_s, stride_key_d, num_keys, True, HEAD_DIM, BLOCK_N, BLOCK_D)
    v = load_tile(value, first, stride_value_s, stride_value_d, num_keys, True, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
    strides = (stride_query_h, stride_query_t, stride_query_d, stride_grad_h, stride_grad_t, stride_grad_d)
    head = kv_head * groups
    query += batch * stride_query_b + tl.cast(head, tl.int64) * stride_query_h
    grad_out += batch * stride_grad_b + tl.cast(head, tl.int64) * stride_grad_h
    row_lse += (batch * num_heads + head) * num_rows
    delta += (batch * num_heads + head) * num_rows
    if BIAS != NO_BIAS:
        bias += batch * stride_bias_b + tl.cast(head, tl.int64) * stride_bias_h
    bias_strides = (stride_bias_h, stride_bias_t, stride_bias_s)
    dk = tl.full((BLOCK_N, BLOCK_D), 0.0, tl.float32)
    dv = tl.full((BLOCK_N, BLOCK_DV), 0.0, tl.float32)
    for index in range(num_pieces if HAS_PLAN else 1):
        held = load_piece(plan, index, num_keys, num_rows, left, right, HAS_PLAN)
        key_begin, key_end, row_begin, row_end, piece_left, piece_right = held
        # Seen from a key, rows lie the other way: shift changes its sign and the bounds change sides.
        begin, whole_begin, whole_end, end = span(
            tl.maximum(first, key_begin), tl.minimum(high, key_end - 1), -shift, piece_right, piece_left, row_begin,
            row_end, limits, HAS_RIGHT, HAS_LEFT, BLOCK_M,
        )  # fmt: skip
        if HAS_PLAN:
            inside = (first >= key_begin) & (high < key_end)
            end = tl.where(key_begin > high, begin, end)
            whole_begin, whole_end = tl.where(inside, whole_begin, begin), tl.where(inside, whole_end, begin)
        if BIAS != NO_BIAS:
            whole_begin, whole_end = begin, begin
        piece = (row_begin, row_end, key_begin, key_end, piece_left, piece_right, num_rows)
        for MASKED in tl.static_range(1 if BIAS != NO_BIAS else 0, 2):  # the whole tiles, then the others
            dk, dv = dkdv_range(
                dk, dv, k, v, query, grad_out, row_lse, delta, strides,
                (begin, whole_begin, whole_end, end), keys, head, groups, piece, shift, row_labels,
                key_labels, bias, bias_strides, scale, softcap, dropout, seed, MASKED == 1, HAS_LEFT, HAS_RIGHT,
                HAS_PLAN, LABELS, BIAS, HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV,
                BLOCK_M, PRECISION,
            )  # fmt: skip
    store_tile(d_key, dk * scale, first, stride_dk_s, stride_dk_d, num_keys, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(d_value, dv, first, stride_dv_s, stride_dv_d, num_keys, HEAD_DIM_V, BLOCK_N, BLOCK_DV)
