"""Equal blocks of rows, each over its own keys and keys that all blocks share, as rows of a batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.kernels.choose import rows_at_once


def attend_blocks(
    kernel: BoundAttend, query: Tensor, key: Tensor, value: Tensor, mask: Mask, rows: range, size: int, shared: int
) -> Iterator[Partial]:
    """Attention of the rows `rows` in blocks of `size`; yields partials of consecutive rows.

    A block's keys are 0 .. shared, then those at its own rows. The shared keys are copied before each
    block's own keys: one call then does both, where two calls and a merge cost more than attention to few shared keys.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), row t at key t.
        mask: causal, without tensors, about a block's rows and keys; aligned to the bottom right.
        rows: begin of the first block to the end of the last, a multiple of `size` rows.
        shared: leading keys that every block sees, 0 or more, before the first block.
    """
    at_once = rows_at_once(kernel.name)
    turn = len(rows) if at_once is None else max(1, at_once // size) * size

    def block_keys(tensor: Tensor, first: int, end: int) -> Tensor:
        own = batched(tensor[:, :, first:end], size)
        if not shared:
            return own
        count = len(own) // len(tensor)
        before = tensor[:, None, :, :shared].expand(-1, count, -1, -1, -1).flatten(0, 1)
        return torch.cat([before, own], 2)

    for first in range(rows.start, rows.stop, max(turn, size)):
        end = min(first + turn, rows.stop)
        blocks = batched(query[:, :, first:end], size)
        part = kernel(blocks, block_keys(key, first, end), block_keys(value, first, end), mask=mask)
        yield unbatched(part, len(query))


def batched(tensor: Tensor, size: int) -> Tensor:
    """(B, H, n * size, D) as (B * n, H, size, D): blocks become rows of the batch, a view where B is 1."""
    return tensor.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def unbatched(part: Partial, batch: int) -> Partial:
    """The inverse of `batched` for a partial of `batch` prompts."""
    out, lse = (tensor.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for tensor in part)
    return Partial(out, lse)
