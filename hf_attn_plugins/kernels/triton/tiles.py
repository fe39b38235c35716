"""Device functions that every Triton kernel shares: which columns a tile of rows sees, loads, stores, bias, dropout.

"Rows" and "columns" are the two sides of the score matrix. The forward and dQ kernels hold a tile of query rows and go
over the keys. The dK/dV kernel holds a tile of keys and goes over the query rows: it calls the same functions with the
sides swapped.

Of Triton's own jitted helpers only max and sum are used. Triton binds them to the compiler or to the interpreter at its
first import, so TRITON_INTERPRET=1 must be set before.
"""

# mypy: disallow-untyped-defs=False
# Device functions take tensors, pointers and numbers that Triton types by use.
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)
NO_BOUND: tl.constexpr = tl.constexpr(1 << 30)
HIDDEN: tl.constexpr = tl.constexpr(-(1 << 31))  # the label of columns that no row sees

# Values of the kernels' arguments LABELS and BIAS.
NO_LABELS: tl.constexpr = tl.constexpr(0)
KEY_LABELS: tl.constexpr = tl.constexpr(1)  # a key is seen where its label is 0
BOTH_LABELS: tl.constexpr = tl.constexpr(2)  # a key is seen by rows of the same label
NO_BIAS: tl.constexpr = tl.constexpr(0)
FLOAT_BIAS: tl.constexpr = tl.constexpr(1)
BOOL_BIAS: tl.constexpr = tl.constexpr(2)


@triton.jit
def key_range(
    first, last, shift, left, right, lo, hi, bounds, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The columns of lo..hi that rows first..last see, in steps of BLOCK from `lo`.

    Row t sees the columns t + shift - left .. t + shift + right. `bounds` (begin, end, whole_begin, whole_end) are the
    same limits by labels.

    Returns:
        begin, whole_begin, whole_end, end: columns whole_begin..whole_end need no mask; begin..whole_begin and
        whole_end..end do.
    """
    bound_begin, bound_end, bound_whole_begin, bound_whole_end = bounds
    begin, whole_begin = tl.maximum(lo, bound_begin), tl.maximum(lo, bound_whole_begin)
    end, whole_end = tl.minimum(hi, bound_end), tl.minimum(hi, bound_whole_end)
    if HAS_LEFT:
        begin = tl.maximum(begin, first + shift - left)
        whole_begin = tl.maximum(whole_begin, last + shift - left)
    if HAS_RIGHT:
        end = tl.minimum(end, last + shift + right + 1)
        whole_end = tl.minimum(whole_end, first + shift + right + 1)
    begin = lo + (begin - lo) // BLOCK * BLOCK  # aligned addresses
    whole_begin = begin + (tl.maximum(whole_begin - begin, 0) + BLOCK - 1) // BLOCK * BLOCK
    whole_end = whole_begin + tl.maximum(whole_end - whole_begin, 0) // BLOCK * BLOCK
    none = whole_end <= whole_begin
    return begin, tl.where(none, begin, whole_begin), tl.where(none, begin, whole_end), end


@triton.jit
def count_steps(begin, whole_begin, whole_end, end, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The number of whole tiles (WHOLE), or of tiles that need a mask."""
    if WHOLE:
        return (whole_end - whole_begin) // BLOCK
    else:
        return (tl.maximum(whole_begin - begin, 0) + tl.maximum(end - whole_end, 0) + BLOCK - 1) // BLOCK


@triton.jit
def step_start(step, begin, whole_begin, whole_end, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """The first column of tile number `step` among the whole tiles (WHOLE), or among those that need a mask."""
    if WHOLE:
        return whole_begin + step * BLOCK
    else:
        start = begin + step * BLOCK
        return tl.where(start < whole_begin, start, start + (whole_end - whole_begin))


@triton.jit
def load_bounds(pointer, limit, HAS_BOUNDS: tl.constexpr):
    """The four bounds of one tile; without bounds all columns, 0..limit, are whole."""
    if HAS_BOUNDS:
        return tl.load(pointer), tl.load(pointer + 1), tl.load(pointer + 2), tl.load(pointer + 3)
    else:
        return 0, limit, 0, limit


@triton.jit
def visible(
    rows, keys, piece, labels, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_PLAN: tl.constexpr,
    LABELS: tl.constexpr,
):  # fmt: skip
    """Which (row, key) pairs of a tile are seen; `rows` and `keys` broadcast against each other.

    `piece` is (row begin, row end, key begin, key end, left, right, shift), `labels` (of rows, of keys).
    """
    row_begin, row_end, key_begin, key_end, left, right, shift = piece
    row_labels, key_labels = labels
    seen = (keys < key_end) & (rows < row_end)
    if HAS_PLAN:
        seen = seen & (keys >= key_begin) & (rows >= row_begin)
    if HAS_LEFT:
        seen = seen & (keys - rows >= shift - left)
    if HAS_RIGHT:
        seen = seen & (keys - rows <= shift + right)
    if LABELS != NO_LABELS:
        key_label = tl.load(key_labels + keys, mask=keys < key_end, other=HIDDEN)
        if LABELS == KEY_LABELS:
            seen = seen & (key_label == 0)
        else:
            row_label = tl.load(row_labels + rows, mask=rows < row_end, other=HIDDEN)
            seen = seen & (key_label == row_label) & (key_label != HIDDEN)
    return seen


@triton.jit
def load_tile(
    base, start, stride, stride_dim, end, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """(BLOCK, BLOCK_DIM) of a (tokens, DIM) matrix from token `start`; 0 from `end` on if MASKED, and from DIM on."""
    tokens, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
    # The start is 64-bit, because a cache may have over 2**31 elements; steps inside of a tile are 32-bit.
    pointers = base + tl.cast(start, tl.int64) * stride + tokens[:, None] * stride + dims[None, :] * stride_dim
    if MASKED:
        inside = (start + tokens)[:, None] < end
        if DIM != BLOCK_DIM:
            inside = inside & (dims[None, :] < DIM)
        return tl.load(pointers, mask=inside, other=0.0)
    elif DIM != BLOCK_DIM:
        return tl.load(pointers, mask=dims[None, :] < DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def describe(base, num_tokens, stride, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """A TMA descriptor of a (tokens, DIM) matrix, for `fetch`; elements outside of it are read as 0."""
    return tl.make_tensor_descriptor(
        base, shape=[num_tokens, DIM], strides=[tl.cast(stride, tl.int64), 1], block_shape=[BLOCK, BLOCK_DIM]
    )


@triton.jit
def fetch(
    base, start, stride, stride_dim, end, MASKED: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_DIM: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """`load_tile`, or with TMA a load by descriptor: it is 0 from the end of the matrix on, not from `end` on."""
    if TMA:
        return base.load([start, 0])
    else:
        return load_tile(base, start, stride, stride_dim, end, MASKED, DIM, BLOCK, BLOCK_DIM)


@triton.jit
def store_tile(
    base, tile, start, stride, stride_dim, end, DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_DIM: tl.constexpr
):
    """Store what `load_tile` would load, in the dtype of `base`; tokens from `end` on are left out."""
    tokens, dims = tl.arange(0, BLOCK), tl.arange(0, BLOCK_DIM)
    pointers = base + tl.cast(start, tl.int64) * stride + tokens[:, None] * stride + dims[None, :] * stride_dim
    inside = ((start + tokens)[:, None] < end) & (dims[None, :] < DIM)
    tl.store(pointers, tile.to(base.dtype.element_ty), mask=inside)


@triton.jit
def store_lse(lse, row_lse, places, row_max, row_sum, inside):
    """lse = log(row_sum * 2**row_max), -inf where row_sum is 0. row_lse = log2 of the same, +inf where row_sum is 0.

    The backward reads row_lse: converting the lse would cost float32 gradients more than all their other roundings.
    """
    seen = row_sum > 0
    value = row_max + tl.log2(tl.where(seen, row_sum, 1.0))
    tl.store(lse + places, tl.where(seen, value * LN_2, -float("inf")), mask=inside)
    tl.store(row_lse + places, tl.where(seen, value, float("inf")), mask=inside)


@triton.jit
def tanh(x):
    """tanh to float32 rounding, by a quotient; near 0, where the quotient loses digits, by a series."""
    size = tl.maximum(x, -x)
    rescale = tl.exp2(size * (-2.0 * LOG2_E))
    far = (1.0 - rescale) / (1.0 + rescale)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 - square * (17.0 / 315))))
    return tl.where(size < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def load_bias(bias, stride, keys, inside, BIAS: tl.constexpr):
    """A tile of the bias in float32; True of a bool bias is 0, False -inf. `bias` points at the rows' first keys."""
    value = tl.load(bias + tl.cast(keys, tl.int64) * stride, mask=inside, other=0)
    if BIAS == BOOL_BIAS:
        return tl.where(value != 0, 0.0, -float("inf"))
    else:
        return value.to(tl.float32)


@triton.jit
def dropout_scale(rows, keys, head, drops, dropout):
    """0 for dropped weights, 1 / (1 - p) for kept ones, by the hashes of their rows and keys (see `core/drops.py`).

    Places that only fill up a tile are read as well: there is room behind the last hash.
    """
    row_hashes, key_hashes, num_rows = drops
    row_hash = tl.load(row_hashes + (head * num_rows + rows)).to(tl.uint32, bitcast=True)
    key_hash = tl.load(key_hashes + keys).to(tl.uint32, bitcast=True)
    uniform = (mixed(row_hash ^ key_hash) >> 8).to(tl.float32) * (1.0 / (1 << 24))
    return tl.where(uniform >= dropout, 1.0 / (1.0 - dropout), 0.0)


@triton.jit
def mixed(x):
    """`mixed` of `core/drops.py`."""
    x = (x ^ (x >> 16)) * tl.cast(0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.cast(0x846CA68B, tl.uint32)
    return x ^ (x >> 16)
