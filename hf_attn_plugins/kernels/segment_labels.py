"""Padding and packed segments as integer labels, and the bounds that let the kernels skip tiles because of them.

Everything stays on the device: no call here waits for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

HIDDEN = -(2**31)  # as triton/tiles.py HIDDEN: the label of keys that no row sees
_SEEN, _HIDDEN = torch.zeros((), dtype=torch.int32), torch.full((), HIDDEN, dtype=torch.int32)  # faster than numbers
LABEL_CHUNK = 64  # columns whose labels are summarised together
MOST_CHUNKS = 1024  # beyond which chunks grow, so that the summary stays small


class Labels(NamedTuple):
    """rows (B or 1, T) and keys (B or 1, S), int32; a row sees the keys of its label; rows None: they see label 0."""

    rows: Tensor | None
    keys: Tensor


def make_labels(
    key_padding: Tensor | None, query_segments: Tensor | None, key_segments: Tensor | None
) -> Labels | None:
    """The labels of a mask's padding and segments, None when it has neither."""
    if query_segments is None or key_segments is None:
        if key_padding is None:
            return None
        return Labels(None, torch.where(key_padding, _SEEN, _HIDDEN).contiguous())
    keys = key_segments.to(torch.int32)
    if key_padding is not None:
        keys = torch.where(key_padding, keys, HIDDEN)
    return Labels(query_segments.to(torch.int32).contiguous(), keys.contiguous())


def row_bounds(labels: Labels, num_rows: int, row_tile: int) -> Tensor:
    """(B, row tiles, 4) int32: the keys begin..end that a tile of rows may see, whole_begin..whole_end that all see."""
    rows = labels.rows
    if rows is None:
        rows = labels.keys.new_zeros(1, 1).expand(1, num_rows)
    return _bounds(rows, row_tile, labels.keys)


def key_bounds(labels: Labels, num_rows: int, key_tile: int) -> Tensor:
    """(B, key tiles, 4) int32: the same for tiles of keys and the rows that see them."""
    rows = labels.rows
    if rows is None:
        rows = labels.keys.new_zeros(1, 1).expand(1, num_rows)
    return _bounds(labels.keys, key_tile, rows)


def _bounds(held: Tensor, tile: int, walked: Tensor) -> Tensor:
    length = walked.shape[-1]
    chunk = LABEL_CHUNK
    while length > chunk * MOST_CHUNKS:
        chunk *= 2
    low, high = (x.unsqueeze(-1) for x in _extremes(held, tile))
    chunk_low, chunk_high = (x.unsqueeze(-2) for x in _extremes(walked, chunk))
    meet = (low <= chunk_high) & (chunk_low <= high) & (chunk_high > HIDDEN) & (high > HIDDEN)
    whole = (low == high) & (chunk_low == chunk_high) & (low == chunk_low) & (low > HIDDEN)
    index = torch.arange(meet.shape[-1], device=held.device)
    count = len(index)
    begin = torch.where(meet, index, count).amin(-1)
    end = torch.where(meet, index + 1, 0).amax(-1)
    whole_begin = torch.where(whole, index, count).amin(-1)
    whole_end = torch.where(~whole & (index > whole_begin.unsqueeze(-1)), index, count).amin(-1)
    bounds = torch.stack([begin, end, whole_begin, whole_end], -1) * chunk
    return bounds.clamp_max(length).to(torch.int32).contiguous()


def _extremes(labels: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest label of every `size` neighbours; the last group may be shorter."""
    short = -labels.shape[-1] % size
    if short:
        labels = torch.cat([labels, labels[..., -1:].expand(*labels.shape[:-1], short)], -1)
    groups = labels.unflatten(-1, (-1, size))
    return groups.amin(-1), groups.amax(-1)
