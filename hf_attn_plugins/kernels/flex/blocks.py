"""Which tiles of the score matrix a mask needs, for FlexAttention: from bounds, so that no T x S mask is ever made.

Everything stays on the device: no call here waits for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.flex.plan import TILE
from hf_attn_plugins.kernels.segment_labels import Labels, row_bounds


class Tiles(NamedTuple):
    """The tiles that each tile of rows visits: counts (B or 1, 1, row tiles) and indices (B or 1, 1, row tiles, key
    tiles), int32. `full` ones are seen whole, and FlexAttention does not evaluate the mask in them."""

    counts: Tensor
    indices: Tensor
    full_counts: Tensor
    full_indices: Tensor


def tiles_of(
    mask: Mask, labels: Labels | None, rows: int, keys: int, device: torch.device,
    plan: tuple[Tensor, Tensor] | None = None,
) -> Tiles:  # fmt: skip
    """The tiles of a mask: those that its band of positions, its prefix and its labels reach.

    Args:
        mask: causal, window, prefix and offset are read. With a predicate or a bool bias no tile counts as full.
        labels: of its padding and segments, `segment_labels.make_labels`.
        plan: tiles that a plan reaches and those that it sees whole, (B or 1, row tiles, key tiles), bool; then the
            positions of the mask are not read.
    """
    seen, whole = plan or _by_position(mask, rows, keys, device)
    if labels is not None:
        begin = torch.arange(0, keys, TILE, device=device)[None]
        end = begin + TILE
        low, high, whole_low, whole_high = row_bounds(labels, rows, TILE).unsqueeze(-2).unbind(-1)  # (B, tiles, 1)
        seen = seen & (begin < high) & (end > low)
        whole = whole & (begin >= whole_low) & (end <= whole_high)
    whole = whole & seen
    if mask.predicate is not None or (mask.bias is not None and mask.bias.dtype == torch.bool):
        whole = torch.zeros_like(whole)
    return Tiles(*_listed(seen & ~whole), *_listed(whole))


def _by_position(mask: Mask, rows: int, keys: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which tiles hold a pair that is seen, and which are seen whole: (1, row tiles, key tiles), bool."""
    first = torch.arange(0, rows, TILE, device=device)[:, None]
    last = (first + TILE).clamp_max(rows) - 1
    begin = torch.arange(0, keys, TILE, device=device)[None]
    end = begin + TILE  # of a ragged last tile: beyond the keys, so that the tile is never whole
    seen = torch.ones(len(first), begin.shape[1], dtype=torch.bool, device=device)
    whole = (first + TILE <= rows) & (end <= keys)
    left, right = mask.window
    if mask.causal:
        right = 0 if right is None else min(right, 0)
    offset = keys - rows if mask.offset is None else mask.offset
    if right is not None:
        seen, whole = seen & (begin <= last + offset + right), whole & (end - 1 <= first + offset + right)
    if left is not None:
        seen, whole = seen & (end - 1 >= first + offset - left), whole & (begin >= last + offset - left)
    if mask.prefix:
        inside = (first + TILE <= rows) & (end <= min(mask.prefix, keys))
        seen, whole = seen | (begin < mask.prefix), whole | inside
    return seen[None], whole[None]


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Counts and indices of the True entries of the last dimension; indices after the first `count` are not read."""
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True)
    return tiles.sum(-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
