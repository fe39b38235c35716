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
PRODUCT_ROWS, LEAST_ROWS = 1024, 64  # rows of one product, over heads that share keys; and rows of a tile at least
SCORES = 2**20  # scores in memory at a time, over all heads of a chunk (4 MiB in float32): fewer are slow with threads
BACKWARD_SHARE = 4  # backward: a share of them, because it holds the scores and their gradients beside its results
SHARED_MASK = 4  # times as many if the mask has tensors or a predicate: a tile's mask is built once for all its heads


def sizes(query: Tensor, key: Tensor, mask: Mask, backward: bool = False) -> tuple[int, int, int]:
    """(rows of a tile, keys of a tile, key heads whose scores fit `SCORES`); at least 1 each.

    `backward` has smaller ones: it holds the scores and their gradients.
    """
    (rows, num_keys), group_size = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    # Half of the scores of a diagonal tile are wasted; in long sequences few tiles are diagonal. Heads that share keys
    # are rows of one product, which is large enough with a small tile.
    small = backward or (mask.causal and (rows < LONG or group_size > 1))
    most = max(LEAST_ROWS, PRODUCT_ROWS // group_size // LEAST_ROWS * LEAST_ROWS)
    row_tile = max(1, min(rows, most, ROW_TILE // 2 if small else ROW_TILE))
    key_tile = max(1, min(num_keys, KEY_TILE // 2 if mask.causal and num_keys < SHORT else KEY_TILE))
    scores = SCORES if mask.has_no_tensors() else SCORES * SHARED_MASK
    scores = scores // BACKWARD_SHARE if backward else scores
    return row_tile, key_tile, max(1, scores // (group_size * row_tile * key_tile))


Chunk = tuple[int, slice, slice, TileMap]


def chunks(query: Tensor, key: Tensor, mask: Mask, backward: bool = False) -> list[Chunk]:
    """Split a call into (batch index, query heads, key heads, tiles) so that a chunk's scores fit `SCORES`."""
    (batch, heads, rows, _), (kv_heads, num_keys) = query.shape, key.shape[1:3]
    group_size = heads // kv_heads
    row_tile, key_tile, at_once = sizes(query, key, mask, backward)
    work = []
    for b in range(batch):
        tiles = TileMap(mask.slice_batch(b), rows, num_keys, row_tile, key_tile)
        for h in range(0, kv_heads, at_once):
            end = min(h + at_once, kv_heads)
            work.append((b, slice(h * group_size, end * group_size), slice(h, end), tiles))
    return work


def scores_at_once(work: list[Chunk]) -> int:
    """Scores of a tile of the largest chunk, which is the first."""
    _, heads, _, tiles = work[0]
    return (heads.stop - heads.start) * tiles.row_tile * tiles.key_tile


def is_fast(query: Tensor, mask: Mask, softcap: float | None) -> bool:
    """Whether scores may stay in bfloat16: only their exponential is needed, no softcap and no float bias."""
    has_float_bias = mask.bias is not None and mask.bias.is_floating_point()
    return query.dtype == torch.bfloat16 and softcap is None and not has_float_bias


class Block:
    """A contiguous copy (heads, keys, D + columns) of one tile of keys or values; the added columns are 1.

    A batched product would copy a strided tile every time. It does not copy a transposed contiguous one. The memory
    is used again for the next tile.
    """

    def __init__(self, tensor: Tensor, key_tile: int, columns: int) -> None:
        self.tensor, self.begin = tensor, -1
        self.memory = tensor.new_ones(len(tensor), min(key_tile, tensor.shape[1]), tensor.shape[-1] + columns)

    def of(self, begin: int, end: int) -> Tensor:
        """(heads, keys begin..end, D + columns): `begin` is where a key tile begins, `end` lies in the tile."""
        if begin != self.begin:
            tile = self.tensor[:, begin : begin + self.memory.shape[1]]
            self.memory[:, : tile.shape[1], : tile.shape[2]].copy_(tile)
            self.begin = begin
        return self.memory[:, : end - begin]
