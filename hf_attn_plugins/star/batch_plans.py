"""Where the prompts of a batch lie, and the pattern as an index function for masks that are not plain runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import (
    ANCHOR_SHARE,
    DEFAULT_QUERY,
    DENSE_BELOW,
    NEAR_ANCHOR,
    NEAR_BLOCK,
    PAPER,
    Plan,
    default_halo,
    paper_block,
)


def prompts_of(mask: Mask, batch: int, rows: int) -> list[tuple[int, int, int]] | None:
    """(row of the batch, first, end) of every prompt: the real tokens of a row, or those of each of its segments.

    None where the tokens of a prompt are not next to each other.
    """
    ids = torch.zeros(1, rows, dtype=torch.long) if mask.query_segments is None else mask.query_segments
    ids = ids.expand(batch, rows).clone()
    if mask.key_segments is not None and not torch.equal(ids, mask.key_segments[:, :rows].expand(batch, rows)):
        return None
    if mask.key_padding is not None:
        real = mask.key_padding[:, :rows].expand(batch, rows).to(ids.device)
        ids = torch.where(real, ids - ids.min() + 1, 0)
    else:
        ids = ids - ids.min() + 1
    prompts = []
    for member, row in enumerate(ids.cpu()):
        values, counts = torch.unique_consecutive(row, return_counts=True)
        ends = counts.cumsum(0).tolist()
        runs = [(int(v), end - int(n), end) for v, n, end in zip(values, counts, ends, strict=True) if v]
        if len({value for value, _, _ in runs}) < len(runs):
            return None
        prompts += [(member, first, end) for _, first, end in runs]
    return prompts


def plans_of(mask: Mask, batch: int, rows: int, plan_of: Callable[[int], Plan]) -> list[list[tuple[int, Plan]]] | None:
    """(first token, plan) of the prompts in every row of the batch, or in one row that stands for all.

    Where a prompt's tokens are not next to each other, its plan counts what lies between them, as `masked` does, and
    the mask has to hide that. None while a graph is traced in which lengths are data.
    """
    if mask.key_padding is None and mask.query_segments is None:
        return [[(0, plan_of(rows))]]
    if torch.compiler.is_compiling():
        return None
    spans = prompts_of(mask, batch, rows)
    if spans is None:
        real = torch.ones(batch, rows) if mask.key_padding is None else mask.key_padding[:, :rows].expand(batch, rows)
        places = [row.nonzero().flatten().tolist() for row in real.cpu()]
        spans = [(member, place[0], place[-1] + 1) for member, place in enumerate(places) if place]
    plans: list[list[tuple[int, Plan]]] = [[] for _ in range(batch)]
    for member, first, end in spans:
        plans[member].append((first, plan_of(end - first)))
    return plans


class Sizes(NamedTuple):
    """Plans of the rows of a batch, each field (B,) or (1,): first real token, then as in `Plan`."""

    first: Tensor
    block: Tensor
    anchor: Tensor
    context: Tensor
    halo: Tensor


def masked(mask: Mask, rows: int, options: StarOptions, device: torch.device | None = None) -> Mask:
    """`mask` with the pattern as a predicate: right for every mask, but kernels then visit all tiles.

    `device` is that of the call; kernels compiled for a GPU take no numbers from the CPU.
    """
    sizes, given = row_sizes(mask, rows, options, device), mask.predicate

    def star(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        first, block, anchor, context, halo = (size[b] if len(size) > 1 else size for size in sizes)
        token, other = q - first, k - first
        seen = (token >= context) | (other < anchor) | (other >= token // block * block - halo)
        if mask.beside is not None:
            seen = seen | mask.beside(b, h, q, k)
        if isinstance(mask.offset, Tensor):
            seen = seen | (mask.offset > 0)  # rows that come once the cache is filled are query rows
        return seen if given is None else seen & given(b, h, q, k)

    return mask.replace(predicate=star)


def row_sizes(mask: Mask, rows: int, options: StarOptions, device: torch.device | None = None) -> Sizes:
    """What `plan_for` gives for each row of the batch, in tensors: nothing is read from the device."""
    if mask.key_padding is None:
        first = torch.zeros(1, dtype=torch.long, device=device)
        length = torch.full((1,), rows, device=device)
    else:
        real = mask.key_padding[:, :rows]
        position = torch.arange(real.shape[1], device=real.device)
        end = torch.where(real, position + 1, 0).amax(-1)
        first = torch.minimum(torch.where(real, position, rows).amin(-1), end)
        length = end - first
    query = DEFAULT_QUERY if options.query_size is None else options.query_size
    context = (length - query).clamp_min(0)
    long = length >= DENSE_BELOW
    paper = options.preset == PAPER or (options.block_size is not None and options.halo_size is None)
    if options.halo_size is not None or paper:
        halo = torch.full_like(length, options.halo_size or 0)
    else:
        halo = torch.where(long, default_halo(length), 0)
    if options.block_size is not None:
        block = torch.full_like(length, options.block_size)
    else:
        cut = paper_block(context.clamp_min(1)) if paper else torch.full_like(length, NEAR_BLOCK)
        block = torch.where(long, cut, length.clamp_min(1)).maximum((options.anchor_size or 1) - halo)
    if options.anchor_size is not None:
        anchor = torch.full_like(length, options.anchor_size)
    else:
        anchor = torch.where(halo > 0, (block + halo).clamp_max(NEAR_ANCHOR), block // ANCHOR_SHARE)
    return Sizes(first, block, anchor, context, halo)
