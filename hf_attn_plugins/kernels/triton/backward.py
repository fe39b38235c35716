"""What both passes of the backward share: delta, and the weights P, computed again from the lse.

dS = P * (dO V^T - delta) with delta = sum(dO * O) - dlse, where dlse is the gradient of the lse. One program writes
each element of the output, in one order, so gradients are bit for bit the same in every run.
Source: FlashAttention-2, arXiv 2307.08691, algorithm 2, here in two passes.
"""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.kernels.triton.tiles import (
    LOG2_E,
    NO_BIAS,
    load_bias,
    load_tile,
    tanh,
    visible,
)


@triton.jit
def delta_kernel(
    out, grad_out, grad_lse, delta,
    stride_out_b, stride_out_h, stride_out_t, stride_out_d,
    stride_grad_b, stride_grad_h, stride_grad_t, stride_grad_d,
    num_rows, num_heads,
    HAS_GRAD_LSE: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_M rows of delta (B, H, T) = sum(grad_out * out) - grad_lse."""
    tiles = (num_rows + BLOCK_M - 1) // BLOCK_M
    first, batch_head = tl.program_id(0) % tiles * BLOCK_M, tl.cast(tl.program_id(0) // tiles, tl.int64)
    batch, head = batch_head // num_heads, batch_head % num_heads
    out += batch * stride_out_b + head * stride_out_h
    grad_out += batch * stride_grad_b + head * stride_grad_h
    o = load_tile(out, first, stride_out_t, stride_out_d, num_rows, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    g = load_tile(grad_out, first, stride_grad_t, stride_grad_d, num_rows, True, HEAD_DIM_V, BLOCK_M, BLOCK_DV)
    sums = tl.sum(o.to(tl.float32) * g.to(tl.float32), 1)
    row = first + tl.arange(0, BLOCK_M)
    place = batch_head * num_rows + row
    if HAS_GRAD_LSE:
        sums -= tl.load(grad_lse + place, mask=row < num_rows, other=0.0)
    tl.store(delta + place, sums, mask=row < num_rows)


@triton.jit
def weights_and_slope(
    scores, rows, keys, row_lse, piece, labels, bias_rows, stride_bias, scale, softcap, MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr, LABELS: tl.constexpr,
    BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """(P, slope) from the products of query and key; slope is d capped / d scaled score, 1 without a softcap."""
    slope = 1.0
    if HAS_SOFTCAP:
        bent = tanh(scores * (scale / softcap))
        slope = 1.0 - bent * bent
        scores = bent * (softcap * LOG2_E)
    else:
        scores = scores * (scale * LOG2_E)
    if BIAS != NO_BIAS:
        inside = (rows < piece[1]) & (keys < piece[3])
        scores += load_bias(bias_rows, stride_bias, keys, inside, BIAS) * LOG2_E
    weights = tl.exp2(scores - row_lse)
    if MASKED:
        seen = visible(rows, keys, piece, labels, HAS_LEFT, HAS_RIGHT, HAS_PLAN, LABELS)
        weights = tl.where(seen, weights, 0.0)
    return weights, slope


@triton.jit
def load_row_numbers(row_lse, delta, rows, row_end, MASKED: tl.constexpr):
    """(row_lse of the forward, delta) of some rows; from `row_end` on row_lse is +inf, so that P is 0."""
    if MASKED:
        inside = rows < row_end
        return tl.load(row_lse + rows, mask=inside, other=float("inf")), tl.load(delta + rows, mask=inside, other=0.0)
    else:
        return tl.load(row_lse + rows), tl.load(delta + rows)
