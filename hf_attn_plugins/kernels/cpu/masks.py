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
    """Masks of the tiles that need one, as 0 and -inf to add. Masks that depend on positions only are cached."""

    def __init__(self, tiles: TileMap, heads: slice, group_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.tiles, self.heads, self.group_size, self.dtype, self.device = tiles, heads, group_size, dtype, device
        self.cache: dict[tuple[int, int, int], Tensor] = {}

    def bias(self, t0: int, t1: int, tile: KeyTile) -> Tensor:
        """0 for seen and -inf for hidden pairs, broadcastable to (kv heads, group_size, rows, keys)."""
        if not self.tiles.mask.has_no_tensors() or self.tiles.mask.prefix:
            return self._build(t0, t1, tile)
        place = (t0 - tile.begin, t1 - t0, tile.end - tile.begin)
        if place not in self.cache:
            self.cache[place] = self._build(t0, t1, tile)
        return self.cache[place]

    def add_to(self, view: Tensor, t0: int, t1: int, tile: KeyTile) -> None:
        """Add a float bias, and -inf for hidden pairs, to scores (kv heads, group_size, rows, keys) in place."""
        bias = self.tiles.mask.bias
        if bias is not None and bias.is_floating_point():
            rows, keys = self._places(t0, t1, tile)
            view += per_head(self.tiles.mask.bias_tile(rows, keys)[0].to(self.dtype), self.heads, self.group_size)
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
        rows, keys = self._places(t0, t1, tile)
        visible = self.tiles.mask.visible(rows, keys, self.tiles.start)[0]
        return per_head(torch.where(visible, 0.0, -torch.inf).to(self.dtype), self.heads, self.group_size)

    def _places(self, t0: int, t1: int, tile: KeyTile) -> tuple[Tensor, Tensor]:
        return torch.arange(t0, t1, device=self.device), torch.arange(tile.begin, tile.end, device=self.device)


def per_head(tensor: Tensor, heads: slice, group_size: int) -> Tensor:
    """(H or 1, rows, keys) as (kv heads or 1, group_size or 1, rows, keys) for the heads of a chunk."""
    return tensor.unsqueeze(0) if tensor.shape[0] == 1 else tensor[heads].unflatten(0, (-1, group_size))
