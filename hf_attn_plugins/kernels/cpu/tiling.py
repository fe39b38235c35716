"""How one call is cut into tiles: chunks of heads, sizes of row and key tiles, contiguous blocks of keys."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.cpu.tile_map import TileMap

LOG2_E = math.log2(math.e)
ROW_TILE, KEY_TILE = 512, 512  # query rows and keys of a tile
# Causal calls halve the key tile below SHORT keys; they halve the row tile below LONG rows, or if heads share keys.
SHORT, LONG = 2048, 8192
SCORES = 2**22  # scores in memory at a time, over all heads of a chunk (8 MiB in bfloat16)


def chunks(query: Tensor, key: Tensor, mask: Mask) -> list[tuple[int, slice, slice, TileMap]]:
    """Split a call into (batch index, query heads, key heads, tiles) so that a chunk's scores fit `SCORES`."""
    batch, heads, rows, _ = query.shape
    kv_heads, num_keys = key.shape[1:3]
    group_size = heads // kv_heads
    # Half of the scores of a diagonal tile are wasted; in long sequences few tiles are diagonal. Heads that share keys
    # are rows of one product, which is large enough with a small tile.
    small = mask.causal and (rows < LONG or group_size > 1)
    row_tile = max(1, min(rows, ROW_TILE // 2 if small else ROW_TILE))
    key_tile = max(1, min(num_keys, KEY_TILE // 2 if mask.causal and num_keys < SHORT else KEY_TILE))
    at_once = max(1, min(kv_heads, SCORES // (group_size * row_tile * key_tile)))
    work = []
    for b in range(batch):
        tiles = TileMap(mask.slice_batch(b), rows, num_keys, row_tile, key_tile)
        for h in range(0, kv_heads, at_once):
            end = min(h + at_once, kv_heads)
            work.append((b, slice(h * group_size, end * group_size), slice(h, end), tiles))
    return work


def is_fast(query: Tensor, mask: Mask, softcap: float | None) -> bool:
    """Whether scores may stay in bfloat16: only their exponential is needed, no softcap and no float bias."""
    has_float_bias = mask.bias is not None and mask.bias.is_floating_point()
    return query.dtype == torch.bfloat16 and softcap is None and not has_float_bias


def key_blocks(tensor: Tensor, tiles: TileMap, columns: int) -> list[Tensor]:
    """One contiguous (heads, keys, D + columns) block per key tile; the added columns are 1.

    A batched product would copy a strided tile every time. It does not copy a transposed contiguous one.
    """
    if not columns:
        return [tensor[:, s:e].contiguous() for s, e in tiles.key_tiles]
    ones = tensor.new_ones(tensor.shape[0], tiles.key_tile, columns)
    return [torch.cat([tensor[:, s:e], ones[:, : e - s]], 2) for s, e in tiles.key_tiles]
