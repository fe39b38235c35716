"""What the forward, dQ and dK/dV programs share: their tile, their mask, and the columns that a piece needs.

A program holds one tile of tokens of one side of the score matrix and goes over the tokens of the other side (see
`tiles.py`). "Held" and "other" name the two sides here.
"""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.triton.tiles import BOTH_LABELS, NO_BIAS, NO_BOUND, NO_LABELS, key_range, load_bounds

RECTANGLE_FIELDS: tl.constexpr = tl.constexpr(len(Rectangle._fields))


@triton.jit
def program_tile(num_tokens, num_heads, LAST_FIRST: tl.constexpr, BLOCK: tl.constexpr):
    """The held tile of this program: its number, first and last token, its head, and its row of the batch (64 bits).

    LAST_FIRST: start with the last tile. The last rows of a causal mask see most keys and take longest.
    """
    tiles = (num_tokens + BLOCK - 1) // BLOCK
    tile, batch_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    first = tile * BLOCK
    last = tl.minimum(first + BLOCK, num_tokens) - 1
    return tile, first, last, batch_head % num_heads, tl.cast(batch_head // num_heads, tl.int64)


@triton.jit
def head_pointer(base, batch, head, stride_b, stride_h):
    """Pointer to the first element of the (tokens, dims) matrix of one row of the batch and one head."""
    return base + batch * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def row_bias(bias, batch, head, rows, stride_b, stride_h, stride_t, BIAS: tl.constexpr):
    """Pointers to the rows' first element of the bias."""
    if BIAS != NO_BIAS:
        bias = head_pointer(bias, batch, head, stride_b, stride_h) + tl.cast(rows, tl.int64) * stride_t
    return bias


@triton.jit
def load_offset(offset, offset_pointer, HAS_OFFSET: tl.constexpr):
    """The position of row 0 on the key axis."""
    if HAS_OFFSET:
        offset = tl.load(offset_pointer).to(tl.int32)
    return offset


@triton.jit
def batch_hashes(row_hashes, key_hashes, batch, num_rows, num_keys, num_heads, HAS_DROPOUT: tl.constexpr):
    """The hashes of one row of the batch, for `dropout_scale`: (row hashes, head by head; key hashes; rows)."""
    if HAS_DROPOUT:
        row_hashes += batch * num_heads * num_rows
        key_hashes += batch * num_keys
    return row_hashes, key_hashes, num_rows


@triton.jit
def batch_labels(row_labels, key_labels, stride_row_labels, stride_key_labels, batch, LABELS: tl.constexpr):
    """Pointers to the labels of one row of the batch: (row labels, key labels)."""
    if LABELS != NO_LABELS:
        key_labels += batch * stride_key_labels
    if LABELS == BOTH_LABELS:
        row_labels += batch * stride_row_labels
    return row_labels, key_labels


@triton.jit
def tile_limits(bounds, stride_b, stride_tile, batch, tile, num_others, LABELS: tl.constexpr):
    """The range of other tokens that the labels leave to a tile; see `segment_labels.row_bounds`."""
    if LABELS != NO_LABELS:
        bounds += batch * stride_b + tl.cast(tile, tl.int64) * stride_tile
    return load_bounds(bounds, num_others, LABELS != NO_LABELS)


@triton.jit
def tile_plan(plan, stride_b, stride_tile, batch, tile, HAS_PLAN: tl.constexpr):
    """Pointer to the first piece of a tile."""
    if HAS_PLAN:
        plan += batch * stride_b + tl.cast(tile, tl.int64) * stride_tile
    return plan


@triton.jit
def load_piece(plan, index, num_held, num_others, left, right, shift, HAS_PLAN: tl.constexpr):
    """(held begin, held end, other begin, other end, left, right, shift) of a piece.

    left and right are `NO_BOUND` for a piece that is not banded: its rows see all its keys (`position_masked` False).
    """
    if HAS_PLAN:
        pointer = plan + index * RECTANGLE_FIELDS
        banded = tl.load(pointer + 4) != 0
        return (
            tl.load(pointer),
            tl.load(pointer + 1),
            tl.load(pointer + 2),
            tl.load(pointer + 3),
            tl.where(banded, left, NO_BOUND),
            tl.where(banded, right, NO_BOUND),
            shift + tl.load(pointer + 5),
        )
    else:
        return 0, num_held, 0, num_others, left, right, shift


@triton.jit
def piece_range(
    low, high, piece, limits, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`key_range` of the held tokens low..high that lie in a piece.

    All tiles need a mask if the held tile is not inside of the piece, or if there is a bias.
    """
    held_begin, held_end, other_begin, other_end, left, right, shift = piece
    begin, whole_begin, whole_end, end = key_range(
        tl.maximum(low, held_begin), tl.minimum(high, held_end - 1), shift, left, right, other_begin, other_end,
        limits, HAS_LEFT, HAS_RIGHT, BLOCK,
    )  # fmt: skip
    if HAS_PLAN:
        inside = (low >= held_begin) & (high < held_end)
        end = tl.where(held_begin > high, begin, end)
        whole_begin, whole_end = tl.where(inside, whole_begin, begin), tl.where(inside, whole_end, begin)
    if BIAS != NO_BIAS:
        whole_begin, whole_end = begin, begin
    return begin, whole_begin, whole_end, end
