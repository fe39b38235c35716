"""What the forward, dQ and dK/dV programs share: where one stands, what its mask is, which columns a piece asks for.

A program holds a tile of tokens of one side of the score matrix and walks over the other (see `triton_tiles`).
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
    """The tile of held tokens, the head, and the row of the batch (64 bits) of this program.

    LAST_FIRST: the last rows of a causal mask have most to do, and are started first.
    """
    tiles = (num_tokens + BLOCK - 1) // BLOCK
    tile, batch_head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tile, batch_head % num_heads, tl.cast(batch_head // num_heads, tl.int64)


@triton.jit
def head_pointer(base, batch, head, stride_b, stride_h):
    """Where the (tokens, dims) of one row of the batch and one head begin."""
    return base + batch * stride_b + tl.cast(head, tl.int64) * stride_h


@triton.jit
def load_numbers(offset, offset_pointer, seed_pointer, HAS_OFFSET: tl.constexpr, HAS_DROPOUT: tl.constexpr):
    """The position of row 0 on the key axis, and the seed of dropout."""
    seed = 0
    if HAS_OFFSET:
        offset = tl.load(offset_pointer).to(tl.int32)
    if HAS_DROPOUT:
        seed = tl.load(seed_pointer)
    return offset, seed


@triton.jit
def batch_labels(row_labels, key_labels, stride_row_labels, stride_key_labels, batch, LABELS: tl.constexpr):
    """The labels of one row of the batch."""
    if LABELS != NO_LABELS:
        key_labels += batch * stride_key_labels
    if LABELS == BOTH_LABELS:
        row_labels += batch * stride_row_labels
    return row_labels, key_labels


@triton.jit
def tile_limits(bounds, stride_b, stride_tile, batch, tile, num_walked, LABELS: tl.constexpr):
    """What the labels leave a tile to walk over; see `labels.row_bounds`."""
    if LABELS != NO_LABELS:
        bounds += batch * stride_b + tl.cast(tile, tl.int64) * stride_tile
    return load_bounds(bounds, num_walked, LABELS != NO_LABELS)


@triton.jit
def tile_plan(plan, stride_b, stride_tile, batch, tile, HAS_PLAN: tl.constexpr):
    """Where the list of pieces of a tile begins."""
    if HAS_PLAN:
        plan += batch * stride_b + tl.cast(tile, tl.int64) * stride_tile
    return plan


@triton.jit
def load_piece(plan, index, num_held, num_walked, left, right, shift, HAS_PLAN: tl.constexpr):
    """Held begin, end, walked begin, end, left, right and shift of a piece; unbounded where it is not banded."""
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
        return 0, num_held, 0, num_walked, left, right, shift


@triton.jit
def piece_range(
    low, high, piece, limits, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`key_range` of the held tokens low..high that lie in a piece, without whole tiles where none can be whole."""
    held_begin, held_end, walked_begin, walked_end, left, right, shift = piece
    begin, whole_begin, whole_end, end = key_range(
        tl.maximum(low, held_begin), tl.minimum(high, held_end - 1), shift, left, right, walked_begin, walked_end,
        limits, HAS_LEFT, HAS_RIGHT, BLOCK,
    )  # fmt: skip
    if HAS_PLAN:  # a tile that sticks out of its piece needs a mask everywhere
        inside = (low >= held_begin) & (high < held_end)
        end = tl.where(held_begin > high, begin, end)
        whole_begin, whole_end = tl.where(inside, whole_begin, begin), tl.where(inside, whole_end, begin)
    if BIAS != NO_BIAS:
        whole_begin, whole_end = begin, begin
    return begin, whole_begin, whole_end, end
