"""Tiles in plain PyTorch: FlashAttention's loop for CPUs that multiply bfloat16 faster than float32.

The elementwise work between the two products takes most of the time of such a loop. `_FastRows` does little of it:

* The shift m of a row is subtracted inside of the product: each query has an extra column -m and each key a column 1.
  So scores are rounded to bfloat16 after the shift, when the scores of large weights are near 0 and round least.
* m need not be the row maximum, only close to it. It is guessed from the first keys that a row sees. If a tile's row
  sums show that it is far too small, it is replaced, and only then are sums and outputs rescaled.
* One exp2 and one sum over bfloat16 remain per score.

Heads that share keys are rows of one product; all heads of a chunk are one batched product. `_Rows` is the ordinary
online softmax, in float32 (float64 for float64). It serves other dtypes, softcap and float masks.

Source: FlashAttention-2, arXiv 2307.08691, algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, lse_dtype
from hf_attn_plugins.kernels.cpu.masks import Dropout, TileMasks
from hf_attn_plugins.kernels.cpu.tile_map import KeyTile, TileMap
from hf_attn_plugins.kernels.cpu.tiling import LOG2_E, Block, chunks, is_fast, scores_at_once

FIRST_KEYS, NEAR_KEYS = 64, 64  # keys from which a row's shift is guessed: the first ones, and those near the row


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, Dv) in the query's dtype and lse (B, Hq, T) in float32 (float64 for float64).

    The arguments are as in `kernels.attend`; with dropout the mask has `drops`.
    """
    out, lse = Partial.empty(query, value.shape[-1])
    if out.numel() == 0 or key.shape[2] == 0:
        return out, lse
    rows_of: Any = _FastRows if is_fast(query, mask, softcap) else _Rows
    work = chunks(query, key, mask)
    buffer = query.new_empty(scores_at_once(work))  # for all tiles: new memory for each would cost page faults
    for b, heads, kv_heads, tiles in work:
        loop = rows_of(query[b, heads], key[b, kv_heads], value[b, kv_heads], tiles, scale, softcap, heads, buffer)
        drops = Dropout(dropout, tiles.mask, heads, loop.weights_dtype) if dropout else None
        for index, (t0, t1) in enumerate(tiles.row_tiles):
            key_tiles = tiles.keys_of(index)
            if key_tiles:
                tile_out, tile_lse = loop.run(index, key_tiles, drops)
                out[b, heads, t0:t1], lse[b, heads, t0:t1] = tile_out, tile_lse
        del loop  # its buffers, before the next chunk's are made
    return out, lse


class _Rows:
    """Online softmax over the key tiles of one row tile, for one chunk of heads, in float32 or float64."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        tiles: TileMap,
        scale: float,
        softcap: float | None,
        heads: slice,
        buffer: Tensor,
    ) -> None:
        self.query, self.key, self.value = query, key, value
        self.tiles, self.scale, self.softcap, self.heads = tiles, scale, softcap, heads
        self.kv_heads, self.group_size = key.shape[0], query.shape[0] // key.shape[0]
        self.acc_dtype = self.weights_dtype = lse_dtype(query)
        self.tile_masks = TileMasks(tiles, heads, self.group_size, self.acc_dtype, query.device)
        self.buffer = buffer

    def product(self, rows: Tensor, keys: Tensor) -> Tensor:
        """rows keys^T, written to `self.buffer`."""
        size = (*rows.shape[:2], keys.shape[1])
        return torch.bmm(rows, keys.mT, out=self.buffer[: math.prod(size)].view(size))

    def scores(self, index: int, tile: KeyTile) -> Tensor:
        """(kv heads, group_size * rows, keys) scaled, capped, biased and masked scores in `self.acc_dtype`."""
        t0, t1 = self.tiles.row_tiles[index]
        rows = self.query[:, t0:t1].reshape(self.kv_heads, -1, self.query.shape[-1])
        scores = self.product(rows, self.key[:, tile.begin : tile.end]).to(self.acc_dtype).mul_(self.scale)
        if self.softcap is not None:
            scores = scores.div_(self.softcap).tanh_().mul_(self.softcap)
        view = scores.view(self.kv_heads, self.group_size, t1 - t0, -1)
        self.tile_masks.add_to(view, t0, t1, tile)
        return scores

    def run(self, index: int, key_tiles: list[KeyTile], drops: Dropout | None) -> tuple[Tensor, Tensor]:
        """out (heads, rows, Dv) and lse (heads, rows) of row tile `index`."""
        t0, t1 = self.tiles.row_tiles[index]
        size = (self.kv_heads, self.group_size * (t1 - t0))
        acc = self.query.new_zeros(*size, self.value.shape[-1], dtype=self.acc_dtype)
        row_sum = self.query.new_zeros(size, dtype=self.acc_dtype)
        row_max = self.query.new_full(size, -torch.inf, dtype=self.acc_dtype)
        for tile in key_tiles:
            scores = self.scores(index, tile)
            new_max = torch.maximum(row_max, scores.amax(-1))
            shift = new_max.clamp_min(torch.finfo(self.acc_dtype).min)
            rescale = (row_max - shift).exp()
            weights = scores.sub_(shift.unsqueeze(-1)).exp_()
            row_sum.mul_(rescale).add_(weights.sum(-1))
            if drops is not None:
                weights.mul_(drops.kept(t0, t1, tile, weights))
            acc.mul_(rescale.unsqueeze(-1))
            values = self.value[:, tile.begin : tile.end]
            if values.dtype == acc.dtype:
                acc.baddbmm_(weights, values)
            else:
                acc.add_(torch.bmm(weights.to(values.dtype), values))
            row_max = new_max
        out = acc.div_(torch.where(row_sum > 0, row_sum, 1).unsqueeze(-1))
        lse = row_sum.log().add_(row_max.clamp_min(torch.finfo(self.acc_dtype).min))
        lse.masked_fill_(row_sum == 0, -torch.inf)
        return out.view(-1, t1 - t0, out.shape[-1]), lse.view(-1, t1 - t0)


class _FastRows(_Rows):
    """The same for bfloat16, with the shift inside of the product (see the top of this file)."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, tiles: TileMap, *rest: Any) -> None:
        super().__init__(query, key, value, tiles, *rest)
        self.weights_dtype = query.dtype
        # One block per key tile, or a single one if each tile is read by one row tile only.
        blocks = len(tiles.key_tiles) if len(tiles.row_tiles) > 1 else 1
        self.key_blocks, self.value_blocks = (
            [Block(x, tiles.key_tile, columns) for _ in range(blocks)] for x, columns in ((key, 1), (value, 0))
        )
        self.tile_masks = TileMasks(tiles, self.heads, self.group_size, query.dtype, query.device)
        most_rows = self.group_size * tiles.row_tile
        self.rows = query.new_empty(self.kv_heads, most_rows, query.shape[-1] + 1)
        self.tile_out = query.new_empty(self.kv_heads, most_rows, value.shape[-1])
        self.acc_out = self.tile_out.to(self.acc_dtype)

    def shifted(self, rows: Tensor, tile: KeyTile, keys: int = 0) -> Tensor:
        """Scores in units of log 2, minus the row's shift, of the tile's first `keys` keys; 0 means all keys."""
        return self.product(rows, self.block(self.key_blocks, tile)[:, : keys or None])

    def block(self, blocks: list[Block], tile: KeyTile) -> Tensor:
        return blocks[tile.begin // self.tiles.key_tile % len(blocks)].of(tile.begin, tile.end)

    def tile_weights(self, rows: Tensor, index: int, tile: KeyTile) -> tuple[Tensor, Tensor]:
        """exp2 of the shifted scores, 0 where hidden, and its row sums."""
        scores = self.shifted(rows, tile)
        view, (t0, t1) = scores.view(self.kv_heads, self.group_size, -1, scores.shape[-1]), self.tiles.row_tiles[index]
        self.tile_masks.weights_in_place(view, t0, t1, tile)
        return scores, scores.sum(-1)

    def new_shift(self, rows: Tensor, index: int, tile: KeyTile, keys: int, row_max: Tensor) -> Tensor:
        """Raise `row_max` to the tile's largest scores and write -`row_max` into the last column of `rows`.

        `keys`: only the first `keys` keys are read, and no mask may hide them. 0 means all visible keys.
        """
        rows[..., -1] = 0
        scores = self.shifted(rows, tile, keys)
        if tile.needs_mask and not keys:
            t0, t1 = self.tiles.row_tiles[index]
            scores.view(self.kv_heads, self.group_size, t1 - t0, -1).add_(self.tile_masks.bias(t0, t1, tile))
        row_max = torch.maximum(row_max, scores.amax(-1))
        rows[..., -1] = torch.where(row_max == -torch.inf, 0.0, -row_max)
        return row_max

    def near_shift(self, rows: Tensor, index: int, row_max: Tensor) -> Tensor:
        """Raise `row_max` to the scores of the keys near each row: in text, near and first tokens weigh most."""
        (t0, t1), head_dim = self.tiles.row_tiles[index], self.query.shape[-1]
        count = (t1 - t0) // NEAR_KEYS
        first, size = t0 + self.tiles.start, count * NEAR_KEYS
        if not count or first + size > self.tiles.num_keys:
            return row_max
        shape = (self.kv_heads, self.group_size, t1 - t0)
        near_rows = rows[..., :head_dim].unflatten(1, (self.group_size, -1))[:, :, :size].unflatten(2, (count, -1))
        near_keys = self.key[:, first : first + size].unflatten(1, (count, -1))
        scores = torch.matmul(near_rows, near_keys.unsqueeze(1).mT)
        hidden = torch.ones(NEAR_KEYS, NEAR_KEYS, dtype=torch.bool, device=scores.device).triu_(1)
        best = scores.masked_fill_(hidden, -torch.inf).amax(-1).flatten(2)
        row_max.view(shape)[:, :, :size] = torch.maximum(row_max.view(shape)[:, :, :size], best)
        rows[..., -1] = -row_max
        return row_max

    def run(self, index: int, key_tiles: list[KeyTile], drops: Dropout | None) -> tuple[Tensor, Tensor]:
        t0, t1 = self.tiles.row_tiles[index]
        count, head_dim = self.group_size * (t1 - t0), self.query.shape[-1]
        rows = self.rows[:, :count]
        torch.mul(
            self.query[:, t0:t1].reshape(self.kv_heads, count, head_dim), self.scale * LOG2_E, out=rows[..., :head_dim]
        )
        acc = self.query.new_zeros(self.kv_heads, count, self.value.shape[-1], dtype=torch.float32)
        row_sum = self.query.new_zeros(self.kv_heads, count, dtype=torch.float32)
        row_max = self.query.new_full(row_sum.shape, -torch.inf, dtype=torch.float32)
        for j, tile in enumerate(key_tiles):
            width = tile.end - tile.begin
            if j == 0:
                few = min(FIRST_KEYS, width)
                sure = self.tiles.seen_by_all(index, tile) >= few
                row_max = self.new_shift(rows, index, tile, few if sure else 0, row_max)
                if sure and self.tiles.only_causal:
                    row_max = self.near_shift(rows, index, row_max)
            weights, sums = self.tile_weights(rows, index, tile)
            # A weight is far above 1, or rows see their first key in this tile: move the shift, compute the tile again.
            if bool(sums.amax() > 4 * width) or (j and bool((row_max == -torch.inf).any())):
                new_max = self.new_shift(rows, index, tile, 0, row_max)
                rescale = torch.where(new_max == row_max, 1.0, (row_max - new_max).exp2())
                acc.mul_(rescale.unsqueeze(-1))
                row_sum.mul_(rescale)
                row_max = new_max
                weights, sums = self.tile_weights(rows, index, tile)
            row_sum.add_(sums)
            if drops is not None:
                weights.mul_(drops.kept(t0, t1, tile, weights))
            tile_out = self.tile_out[:, :count]
            torch.bmm(weights, self.block(self.value_blocks, tile), out=tile_out)
            acc.add_(self.acc_out[:, :count].copy_(tile_out))
        out = acc.div_(torch.where(row_sum > 0, row_sum, 1).unsqueeze(-1))
        lse = row_sum.log2().add_(row_max).div_(LOG2_E)
        lse.masked_fill_(row_sum == 0, -torch.inf)
        return out.view(-1, t1 - t0, out.shape[-1]), lse.view(-1, t1 - t0)
