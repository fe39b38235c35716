"""Backward of the tiles in plain PyTorch: weights are recomputed from the saved lse, one tile at a time.

    P = exp(S - lse)        delta = sum(grad_out * out) - grad_lse        dP = grad_out value^T
    dS = P * (dP - delta)   grad_value = P^T grad_out   grad_query = dS key   grad_key = dS^T query

Dropout multiplies P in grad_value, and dP before delta is subtracted. As in the forward pass, the bfloat16 path adds
-lse and -delta inside of the products, as extra columns. Source: arXiv 2307.08691, section 3.1.2.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import lse_dtype
from hf_attn_plugins.kernels.cpu.masks import Dropout, TileMasks
from hf_attn_plugins.kernels.cpu.tile_map import KeyTile, TileMap
from hf_attn_plugins.kernels.cpu.tiling import LOG2_E, Block, chunks, is_fast, scores_at_once

HUGE = 1e30  # replaces the lse of rows without keys: exp(score - HUGE) is 0, and HUGE * 0 is 0 where inf * 0 is NaN


def backward(
    grad_out: Tensor | None,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    dropout: float,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of query, key, value and, if `needs_bias`, of a float `mask.bias`, in their shapes and dtypes.

    Args:
        grad_out, grad_lse: (B, Hq, T, Dv) and (B, Hq, T); None for 0.
        query, key, value, mask, scale, softcap, dropout: as in `forward`; out, lse: as it returned them.
        needs_bias: whether to compute the gradient of the bias; None is returned otherwise.
    """
    grads = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    grad_bias = None
    if needs_bias:
        assert mask.bias is not None
        shape = (1,) * (4 - mask.bias.ndim) + mask.bias.shape
        grad_bias = torch.zeros(shape, dtype=lse_dtype(query), device=mask.bias.device)
    if out.numel() and key.shape[2]:
        grad_out = out.new_zeros(()).expand_as(out) if grad_out is None else grad_out
        loop_of: Any = _FastTiles if is_fast(query, mask, softcap) else _Tiles
        work = chunks(query, key, mask, backward=True)
        buffers = [query.new_empty(scores_at_once(work)) for _ in range(2)]
        for b, heads, kv_heads, tiles in work:
            of_lse = None if grad_lse is None else grad_lse[b, heads]
            loop = loop_of(
                query[b, heads], key[b, kv_heads], value[b, kv_heads], out[b, heads], lse[b, heads], grad_out[b, heads],
                of_lse, tiles, scale, softcap, heads, buffers,
            )  # fmt: skip
            loop.grad_bias = None if grad_bias is None else grad_bias[b if grad_bias.shape[0] > 1 else 0]
            drops = Dropout(dropout, tiles.mask, heads, loop.weights_dtype) if dropout else None
            for (s0, s1), pairs in zip(tiles.key_tiles, tiles.by_keys(), strict=True):
                if pairs:
                    grads[1][b, kv_heads, s0:s1], grads[2][b, kv_heads, s0:s1] = loop.run(s0, s1, pairs, drops)
            grads[0][b, heads] = loop.grad_query
            del loop  # its buffers, before the next chunk's are made
    if grad_bias is not None and mask.bias is not None:
        grad_bias = grad_bias.reshape(mask.bias.shape).to(mask.bias.dtype)
    return (*grads, grad_bias)  # type: ignore[return-value]


class _Tiles:
    """One chunk of heads, in float32 or float64: weights and score gradients of one tile after the other.

    Sums of gradients are in this dtype too: of the chunk's queries, and of one tile of keys and values.
    """

    grad_bias: Tensor | None

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor | None,
        tiles: TileMap,
        scale: float,
        softcap: float | None,
        heads: slice,
        buffers: list[Tensor],
    ) -> None:
        self.query, self.key, self.value, self.grad_out = query, key, value, grad_out
        self.tiles, self.scale, self.softcap, self.heads = tiles, scale, softcap, heads
        self.kv_heads, self.group_size = key.shape[0], query.shape[0] // key.shape[0]
        self.acc_dtype = self.weights_dtype = lse_dtype(query)
        self.lse = lse.masked_fill(lse == -torch.inf, HUGE)
        self.delta = (grad_out.to(self.acc_dtype) * out).sum(-1)
        if grad_lse is not None:
            self.delta -= grad_lse
        self.tile_masks = TileMasks(tiles, heads, self.group_size, self.acc_dtype, query.device)
        most_rows, most_keys = self.group_size * tiles.row_tile, tiles.key_tile
        most_parts = max(most_rows, most_keys) * max(query.shape[-1], value.shape[-1])
        # Products are written to buffers: new memory for each of them would cost page faults.
        self.buffers = [*buffers, query.new_empty(self.kv_heads * most_parts)]
        self.acc_part = self.buffers[2].to(self.acc_dtype)
        self.grad_query = torch.zeros(query.shape, dtype=self.acc_dtype, device=query.device)
        self.of_keys = [x.new_zeros(len(x), most_keys, x.shape[-1], dtype=self.acc_dtype) for x in (key, value)]

    def product(self, slot: int, left: Tensor, right: Tensor) -> Tensor:
        """A batched product in buffer `slot`: 0 for scores, 1 for their gradients, 2 for a part of a gradient."""
        size = (*left.shape[:2], right.shape[2])
        return torch.bmm(left, right, out=self.buffers[slot][: math.prod(size)].view(size))

    def part(self, left: Tensor, right: Tensor) -> Tensor:
        """A product as a part of a gradient, in `self.acc_dtype`."""
        product = self.product(2, left, right)
        return self.acc_part[: product.numel()].view(product.shape).copy_(product)

    def rows(self, tensor: Tensor, index: int) -> Tensor:
        """The rows of one row tile, (kv heads, group_size * rows, ...)."""
        t0, t1 = self.tiles.row_tiles[index]
        return tensor[:, t0:t1].reshape(self.kv_heads, -1, *tensor.shape[2:])

    def run(self, s0: int, s1: int, pairs: list[tuple[int, KeyTile]], drops: Dropout | None) -> tuple[Tensor, Tensor]:
        """Gradients of the keys and values s0..s1 (kv heads, keys, D or Dv); adds to `grad_query`.

        `pairs`: the row tiles that see these keys, each with the keys of the tile that it sees.
        """
        grad_key, grad_value = (grad[:, : s1 - s0].zero_() for grad in self.of_keys)
        for index, tile in pairs:
            weights, grad_scores, grad_out = self.weights_and_grad(index, tile, drops)
            (t0, t1), width = self.tiles.row_tiles[index], tile.end - tile.begin
            grad_value[:, :width].add_(self.part(weights.mT, grad_out))
            of_rows = self.part(grad_scores, self.key[:, tile.begin : tile.end])
            self.grad_query[:, t0:t1].add_(of_rows.view(-1, t1 - t0, of_rows.shape[-1]), alpha=self.scale)
            grad_key[:, :width].add_(self.part(grad_scores.mT, self.rows(self.query, index)), alpha=self.scale)
        return grad_key, grad_value

    def weights_and_grad(self, index: int, tile: KeyTile, drops: Dropout | None) -> tuple[Tensor, Tensor, Tensor]:
        """(P with dropout, gradient of the scaled scores, grad_out) in the dtype of the inputs."""
        t0, t1 = self.tiles.row_tiles[index]
        query, grad_out, keys = (
            self.rows(self.query, index),
            self.rows(self.grad_out, index),
            slice(tile.begin, tile.end),
        )
        scores = self.product(0, query, self.key[:, keys].mT).to(self.acc_dtype).mul_(self.scale)
        slope = None
        if self.softcap is not None:
            capped = scores.div_(self.softcap).tanh_()
            slope = 1 - capped * capped
            scores = capped * self.softcap
        view = scores.view(self.kv_heads, self.group_size, t1 - t0, -1)
        self.tile_masks.add_to(view, t0, t1, tile)
        weights = scores.sub_(self.rows(self.lse, index).unsqueeze(-1)).exp_()
        grad_weights = self.product(1, grad_out, self.value[:, keys].mT).to(self.acc_dtype)
        kept = weights
        if drops is not None:
            keep = drops.kept(t0, t1, tile, weights)
            kept, grad_weights = weights * keep, grad_weights.mul_(keep)
        grad_scores = grad_weights.sub_(self.rows(self.delta, index).unsqueeze(-1)).mul_(weights)
        if self.grad_bias is not None:
            self._add_bias(grad_scores.view(view.shape), t0, t1, tile)
        if slope is not None:
            grad_scores = grad_scores.mul_(slope)
        return kept.to(query.dtype), grad_scores.to(query.dtype), grad_out

    def _add_bias(self, grad_scores: Tensor, t0: int, t1: int, tile: KeyTile) -> None:
        assert self.grad_bias is not None
        part = grad_scores.flatten(0, 1)
        target = self.grad_bias if self.grad_bias.shape[0] == 1 else self.grad_bias[self.heads]
        target = target[:, t0:t1] if target.shape[1] > 1 else target
        target = target[..., tile.begin : tile.end] if target.shape[2] > 1 else target
        target += part.sum_to_size(target.shape)


class _FastTiles(_Tiles):
    """The same for bfloat16: -lse and -delta are columns of the products, each in three parts to keep its digits."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        dtype = self.weights_dtype = self.query.dtype
        self.tile_masks = TileMasks(self.tiles, self.heads, self.group_size, dtype, self.query.device)
        log2_lse = (self.lse * LOG2_E).clamp_max(HUGE)
        self.query_columns = torch.cat([self.query * (self.scale * LOG2_E), _split(-log2_lse, dtype)], -1)
        self.grad_columns = torch.cat([self.grad_out, _split(-self.delta, dtype)], -1)
        self.key_columns, self.value_columns = (Block(x, self.tiles.key_tile, 3) for x in (self.key, self.value))

    def weights_and_grad(self, index: int, tile: KeyTile, drops: Dropout | None) -> tuple[Tensor, Tensor, Tensor]:
        t0, t1 = self.tiles.row_tiles[index]
        scores = self.product(0, self.rows(self.query_columns, index), self.key_columns.of(tile.begin, tile.end).mT)
        view = scores.view(self.kv_heads, self.group_size, t1 - t0, -1)
        self.tile_masks.weights_in_place(view, t0, t1, tile)
        weights = scores
        columns, grad_out = self.rows(self.grad_columns, index), self.rows(self.grad_out, index)
        if drops is None:
            grad_scores = self.product(1, columns, self.value_columns.of(tile.begin, tile.end).mT).mul_(weights)
            return weights, grad_scores, grad_out
        keep = drops.kept(t0, t1, tile, weights)
        grad_weights = self.product(1, grad_out, self.value[:, tile.begin : tile.end].mT).mul_(keep)
        grad_scores = grad_weights.sub_(self.rows(self.delta, index).unsqueeze(-1)).mul_(weights)
        return weights * keep, grad_scores, grad_out


def _split(column: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., 3): float32 as high, middle and low part in `dtype`; their sum has about 24 bits."""
    high = column.to(dtype)
    middle = (column - high.to(column.dtype)).to(dtype)
    low = (column - high.to(column.dtype) - middle.to(column.dtype)).to(dtype)
    return torch.stack([high, middle, low], -1)
