"""Equal blocks of rows, each over its own keys and keys that all blocks share, as rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.bound_attend import BoundAttend


def attend_blocks(
    kernel: BoundAttend,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    rows: range,
    size: int,
    *,
    shared: int = 0,
    before: int = 0,
) -> Iterator[Partial]:
    """Attention of the rows `rows` in blocks of `size`; yields partials of consecutive rows.

    A block's keys are 0 .. shared, then `before` keys before its own rows, then those at its rows. The last two are a
    view where there is one prompt and nothing is shared. Shared keys are copied before each block's own: one call then
    does both, where two calls and a merge cost more than attention to few shared keys.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), row t at key t.
        mask: causal, without tensors, about a block's rows and keys; aligned to the bottom right.
        rows: begin of the first block to the end of the last, a multiple of `size` rows.
        shared: leading keys that every block sees, 0 or more, before the first block.
        before: keys before each block that it sees as well, at most as many as stand before the first block.
    """
    if not rows:
        return

    def block_keys(tensor: Tensor) -> Tensor:
        run = tensor[:, :, rows.start - before : rows.stop]
        own = run.unfold(2, before + size, size).permute(0, 2, 1, 4, 3).flatten(0, 1)
        if not shared:
            return own
        first = tensor[:, None, :, :shared].expand(-1, len(rows) // size, -1, -1, -1).flatten(0, 1)
        return torch.cat([first, own], 2)

    blocks = batched(query[:, :, rows.start : rows.stop], size)
    yield unbatched(kernel(blocks, block_keys(key), block_keys(value), mask=mask), len(query))


def batched(tensor: Tensor, size: int) -> Tensor:
    """(B, H, n * size, D) as (B * n, H, size, D): blocks become rows of the batch, a view where B is 1."""
    return tensor.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def unbatched(part: Partial, batch: int) -> Partial:
    """The inverse of `batched` for a partial of `batch` prompts."""
    out, lse = (tensor.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for tensor in part)
    return Partial(out, lse)
