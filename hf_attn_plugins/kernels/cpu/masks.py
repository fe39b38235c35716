"""Masks of single tiles for `cpu_tiled`: -inf for hidden pairs, and what dropout keeps."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugins.core.drops import kept
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.cpu.tile_map import KeyTile, TileMap


class Dropout:
    """What dropout keeps of the weights of one chunk of heads."""

    def __init__(self, dropout: float, mask: Mask, heads: slice, dtype: torch.dtype) -> None:
        assert mask.drops is not None
        (rows,), (self.keys,) = mask.drops.cut(heads=heads).hashes()
        self.rows, self.dropout, self.dtype = rows, dropout, dtype

    def kept(self, t0: int, t1: int, tile: KeyTile, like: Tensor) -> Tensor:
        """0 for dropped weights, 1 / (1 - p) for kept ones, (kv heads, group_size * rows, keys) as `like`."""
        keys = self.keys[tile.begin : tile.end]
        return kept(self.rows[:, t0:t1, None], keys, self.dropout, self.dtype).view(like.shape)


class TileMasks:
    """Masks of the tiles that need one, as 0 and -inf to add. Masks that depend on positions only are kept."""

    def __init__(self, tiles: TileMap, heads: slice, group_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tiles, self.heads, self.group_size, self.dtype, self.device = tiles, heads, group_size, dtype, device
        self.but_bias = tiles.mask.replace(bias=None)
        self.positions_only = tiles.mask.has_no_tensors() and not tiles.mask.prefix

    def bias(self, t0: int, t1: int, tile: KeyTile) -> Tensor:
        """0 for seen and -inf for hidden pairs, broadcastable to (kv heads, group_size, rows, keys)."""
        if not self.positions_only:
            return self._build(t0, t1, tile)
        place, kept = (t0 - tile.begin, t1 - t0, tile.end - tile.begin), self.tiles.position_masks
        if place not in kept:
            kept[place] = self._build(t0, t1, tile)
        return kept[place]

    def add_to(self, view: Tensor, t0: int, t1: int, tile: KeyTile) -> None:
        """Add a float bias, and -inf for hidden pairs, to scores (kv heads, group_size, rows, keys) in place."""
        bias = self.tiles.mask.bias
        if bias is not None and bias.is_floating_point():
            view += self._of_tile(bias, t0, t1, tile).to(self.dtype)
        if tile.needs_mask:
            view += self.bias(t0, t1, tile)

    def weights_in_place(self, view: Tensor, t0: int, t1: int, tile: KeyTile) -> None:
        """Replace scores in units of log 2 (kv heads, group_size, rows, keys) by their exp2, 0 where hidden."""
        if tile.needs_mask and not self.tiles.only_causal:
            view.add_(self.bias(t0, t1, tile))
        view.exp2_()
        if tile.needs_mask and self.tiles.only_causal:  # zeroing a triangle takes a tenth of the time of adding a mask
            view.tril_(t0 + self.tiles.start - tile.begin)

    def _build(self, t0: int, t1: int, tile: KeyTile) -> Tensor:
        rows, keys = (torch.arange(*ends, device=self.device) for ends in ((t0, t1), (tile.begin, tile.end)))
        visible, bias = self.but_bias.visible(rows, keys, self.tiles.start), self.tiles.mask.bias
        if bias is not None and bias.dtype == torch.bool:
            visible = visible & self._of_tile(bias, t0, t1, tile)
        return torch.zeros_like(visible, dtype=self.dtype).masked_fill_(~visible, -torch.inf)

    def _of_tile(self, bias: Tensor, t0: int, t1: int, tile: KeyTile) -> Tensor:
        """`bias` (1, 1 or H, 1 or T, 1 or S) of a tile, broadcastable to (kv heads, group_size, rows, keys)."""
        bias = bias if bias.shape[2] == 1 else bias[:, :, t0:t1]
        bias = bias if bias.shape[3] == 1 else bias[..., tile.begin : tile.end]
        return bias if bias.shape[1] == 1 else bias[0, self.heads].unflatten(0, (-1, self.group_size))
