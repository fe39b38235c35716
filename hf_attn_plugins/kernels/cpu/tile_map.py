"""Which (row tile, key tile) pairs must be computed under a mask, and which of them need the mask applied."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask


class KeyTile(NamedTuple):
    """Keys begin..end of one tile; `needs_mask` is True if the mask may hide a pair of it."""

    begin: int
    end: int
    needs_mask: bool


class TileMap:
    """The tiles of one row of the batch.

    Args:
        mask: of this row: its tensors have a batch dimension of 1 (`Mask.slice_batch`).
        num_rows, num_keys: T and S.
        row_tile, key_tile: rows and keys of a tile; the last tile may be smaller.
    """

    def __init__(self, mask: Mask, num_rows: int, num_keys: int, row_tile: int, key_tile: int) -> None:
        self.mask, self.num_keys = mask, num_keys
        self.row_tile, self.key_tile = row_tile, key_tile
        self.start = mask.start(num_rows, num_keys)
        self.only_causal = mask.causal and mask.window == (None, None) and mask.has_no_tensors() and not mask.prefix
        self.row_tiles = [(t, min(t + row_tile, num_rows)) for t in range(0, num_rows, row_tile)]
        self.key_tiles = [(s, min(s + key_tile, num_keys)) for s in range(0, num_keys, key_tile)]
        self.position_masks: dict[tuple[int, int, int], Tensor] = {}  # what `TileMasks` keeps for all heads
        self._whole: list[bool] | None = None
        self.first_key, self.end_key = 0, num_keys
        if mask.key_padding is not None:
            real = mask.key_padding[0]
            index = real.nonzero().flatten()
            self.first_key, self.end_key = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
            self._whole = [bool(real[s:e].all()) for s, e in self.key_tiles]
        self._row_segments = _ranges(mask.query_segments, self.row_tiles)
        self._key_segments = _ranges(mask.key_segments, self.key_tiles)

    def keys_of(self, index: int) -> list[KeyTile]:
        """The key tiles that rows of row tile `index` see, in order; keys that its last row does not see are cut."""
        mask, (t0, t1) = self.mask, self.row_tiles[index]
        low, high = t0 + self.start, t1 - 1 + self.start
        left, right = mask.window
        first = 0 if left is None else low - left
        end = self.num_keys
        if mask.causal:
            end = min(end, high + 1)
        if right is not None:
            end = min(end, high + right + 1)
        if mask.prefix:
            first, end = 0, max(end, min(mask.prefix, self.num_keys))
        first, end = max(first, self.first_key), min(end, self.end_key)
        tiles = []
        for j, (s0, s1) in enumerate(self.key_tiles):
            s1 = min(s1, end)
            if s1 <= max(s0, first) or not self._segments_meet(index, j):
                continue
            if left is not None and mask.prefix and s0 >= mask.prefix and s1 <= low - left:
                continue
            tiles.append(KeyTile(s0, s1, self._needs_mask(index, j, s0, s1, low, high)))
        return tiles

    def by_keys(self) -> list[list[tuple[int, KeyTile]]]:
        """For each key tile, the (row tile, key tile) pairs to compute, in the order of the rows."""
        pairs: list[list[tuple[int, KeyTile]]] = [[] for _ in self.key_tiles]
        for index in range(len(self.row_tiles)):
            for tile in self.keys_of(index):
                pairs[tile.begin // self.key_tile].append((index, tile))
        return pairs

    def seen_by_all(self, index: int, tile: KeyTile) -> int:
        """A number of first keys of `tile` that every row of row tile `index` sees; 0 where that is not known."""
        if not tile.needs_mask:
            return tile.end - tile.begin
        if not self.only_causal:
            return 0
        return min(max(0, self.row_tiles[index][0] + self.start - tile.begin + 1), tile.end - tile.begin)

    def _segments_meet(self, index: int, j: int) -> bool:
        if self._row_segments is None or self._key_segments is None:
            return True
        (rows_min, rows_max), (keys_min, keys_max) = self._row_segments[index], self._key_segments[j]
        return rows_min <= keys_max and keys_min <= rows_max

    def _needs_mask(self, index: int, j: int, s0: int, s1: int, low: int, high: int) -> bool:
        mask, (left, right) = self.mask, self.mask.window
        if mask.predicate is not None or (mask.bias is not None and mask.bias.dtype == torch.bool):
            return True
        if self._whole is not None and not self._whole[j]:
            return True
        if self._row_segments is not None and self._key_segments is not None:
            bounds = {*self._row_segments[index], *self._key_segments[j]}
            if len(bounds) > 1:
                return True
        if s1 <= mask.prefix:
            return False
        if mask.causal and s1 - 1 > low:
            return True
        return (left is not None and s0 < high - left) or (right is not None and s1 - 1 > low + right)


def _ranges(segments: Tensor | None, tiles: list[tuple[int, int]]) -> list[tuple[int, int]] | None:
    if segments is None:
        return None
    row = segments[0]
    return [(int(row[s:e].min()), int(row[s:e].max())) for s, e in tiles]
