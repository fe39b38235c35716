"""Split-KV decoding, for few query rows and many keys: one kernel computes partials, another merges them.

All query heads of a key head are rows of one tile, so every key is read once. The splits divide the keys that the rows
can see, not the whole cache: a nearly empty static cache costs as little as its filled part.
Source: Flash-Decoding (Dao et al., 2023); the merge is that of `core.partial.merge`.
"""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.kernels.triton.forward import accumulate_piece
from hf_attn_plugins.kernels.triton.program import batch_hashes, batch_labels, head_pointer, load_offset, tile_limits
from hf_attn_plugins.kernels.triton.tiles import NO_BIAS, key_range, store_lse


@triton.jit
def decode_kernel(
    query, key, value, part_out, part_lse, row_labels, key_labels, bounds, bias, offset_pointer, row_hashes, key_hashes,
    stride_query_b, stride_query_h, stride_query_t, stride_query_d,
    stride_key_b, stride_key_h, stride_key_s, stride_key_d,
    stride_value_b, stride_value_h, stride_value_s, stride_value_d,
    stride_row_labels, stride_key_labels, stride_bounds_b,
    stride_bias_b, stride_bias_h, stride_bias_t, stride_bias_s,
    num_rows, num_keys, num_heads, group_size, num_splits, offset, left, right, scale, softcap, dropout,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_OFFSET: tl.constexpr, LABELS: tl.constexpr,
    BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr, HEAD_DIM_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Write one split of part_out (B, H, T, splits, Dv) and part_lse (B, H, T, splits; units of log 2), float32."""
    split, batch_head = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    kv_heads = num_heads // group_size
    kv_head, batch = batch_head % kv_heads, tl.cast(batch_head // kv_heads, tl.int64)
    lane = tl.arange(0, BLOCK_M)
    used = lane < group_size * num_rows
    # Lanes without a row compute row 0 and are not stored.
    row = tl.where(used, lane % num_rows, 0)
    head = kv_head * group_size + tl.where(used, lane // num_rows, 0)
    shift = load_offset(offset, offset_pointer, HAS_OFFSET)
    drops = batch_hashes(row_hashes, key_hashes, batch, num_rows, num_keys, num_heads, HAS_DROPOUT)
    labels = batch_labels(row_labels, key_labels, stride_row_labels, stride_key_labels, batch, LABELS)
    limits = tile_limits(bounds, stride_bounds_b, 0, batch, 0, num_keys, LABELS)
    bias_rows = bias
    if BIAS != NO_BIAS:
        bias_rows = (bias + batch * stride_bias_b + head * stride_bias_h + row * stride_bias_t)[:, None]
    begin, _, _, end = key_range(0, num_rows - 1, shift, left, right, 0, num_keys, limits, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    length = (tl.maximum(end - begin, 0) + num_splits * BLOCK_N - 1) // (num_splits * BLOCK_N) * BLOCK_N
    begin += split * length
    end = tl.minimum(begin + length, end)

    dims = tl.arange(0, BLOCK_D)[None, :]
    head_64 = tl.cast(head, tl.int64)[:, None]
    places = batch * stride_query_b + head_64 * stride_query_h + row[:, None] * stride_query_t + dims * stride_query_d
    q = tl.load(query + places, mask=used[:, None] & (dims < HEAD_DIM), other=0.0)
    key = head_pointer(key, batch, kv_head, stride_key_b, stride_key_h)
    value = head_pointer(value, batch, kv_head, stride_value_b, stride_value_h)
    strides = (stride_key_s, stride_key_d, stride_value_s, stride_value_d)
    bound_begin, bound_end, bound_whole_begin, bound_whole_end = limits
    limits = (
        tl.maximum(bound_begin, begin), tl.minimum(bound_end, end), bound_whole_begin, tl.minimum(bound_whole_end, end)
    )  # fmt: skip
    piece = (0, num_rows, 0, num_keys, left, right, shift)
    acc = tl.full((BLOCK_M, BLOCK_DV), 0.0, tl.float32)
    row_sum = tl.full((BLOCK_M,), 0.0, tl.float32)
    row_max = tl.full((BLOCK_M,), -float("inf"), tl.float32)
    acc, row_sum, row_max = accumulate_piece(
        acc, row_sum, row_max, q, key, value, strides, row[:, None], head[:, None], 0, num_rows - 1, piece, limits,
        labels, bias_rows, stride_bias_s, scale, softcap, dropout, drops, HAS_LEFT, HAS_RIGHT, False, LABELS, BIAS,
        HAS_SOFTCAP, HAS_DROPOUT, HEAD_DIM, HEAD_DIM_V, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, False,
    )  # fmt: skip
    seen = row_sum > 0
    acc = acc / tl.where(seen, row_sum, 1.0)[:, None]
    part = ((batch * num_heads + head) * num_rows + row) * num_splits + split
    dims_v = tl.arange(0, BLOCK_DV)[None, :]
    tl.store(part_out + part[:, None] * HEAD_DIM_V + dims_v, acc, mask=used[:, None] & (dims_v < HEAD_DIM_V))
    split_lse = tl.where(seen, row_max + tl.log2(tl.where(seen, row_sum, 1.0)), -float("inf"))
    tl.store(part_lse + part, split_lse, mask=used)


@triton.jit
def merge_kernel(
    part_out, part_lse, out, lse, row_lse,
    stride_out_b, stride_out_h, stride_out_t, stride_out_d, num_rows, num_heads, num_splits,
    HEAD_DIM_V: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr,
):  # fmt: skip
    """Merge the splits of one row and head into out (B, H, T, Dv), lse and row_lse (B, H, T)."""
    program = tl.cast(tl.program_id(0), tl.int64)
    row, batch_head = program % num_rows, program // num_rows
    head, batch = batch_head % num_heads, batch_head // num_heads
    split, dim = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_DV)
    part = program * num_splits + split
    part_max = tl.load(part_lse + part, mask=split < num_splits, other=-float("inf"))
    row_max = tl.max(part_max, 0)
    score_shift = tl.where(row_max == -float("inf"), 0.0, row_max)
    weights = tl.exp2(part_max - score_shift)
    row_sum = tl.sum(weights, 0)
    inside = (split < num_splits)[:, None] & (dim < HEAD_DIM_V)[None, :]
    parts = tl.load(part_out + part[:, None] * HEAD_DIM_V + dim[None, :], mask=inside, other=0.0)
    merged = tl.sum(parts * weights[:, None], 0) / tl.where(row_sum > 0, row_sum, 1.0)
    place = batch * stride_out_b + head * stride_out_h + row * stride_out_t
    tl.store(out + place + dim * stride_out_d, merged.to(out.dtype.element_ty), mask=dim < HEAD_DIM_V)
    store_lse(lse, row_lse, program, score_shift, row_sum, True)
