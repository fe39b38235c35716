"""Rows that every rank computes, over keys that lie on all ranks: Star's phase 2, decoding, later turns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.kernels.bound_attend import Kernel
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.method import Step


def later(
    query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: Kernel, group: Group
) -> Partial:
    """This rank's keys only, then one exchange of (out, lse), merged in the order of the ranks on all of them.

    Args:
        query: (B, Hq, T, D), the same on every rank; key, value: (B, Hkv, S, D and Dv), this rank's shard.
        window: of this layer, in columns.

    Source: Star Attention, arXiv 2411.17116, phase 2 (algorithm 2), with the merge of `partial.merge`.
    """
    return merge(group.gather_partials(own_keys(query, key, value, window, step, kernel)))


def own_keys(query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: Kernel) -> Partial:
    """Attention of new rows over the keys of this rank, wherever in the context these lie.

    There is no causal mask over what was stored before: a shard's last key is not the query's (defect D1 of the
    original, where the query lost the last keys of every shard but its own).
    """
    assert step.keys is not None
    keys, left = step.keys, window[0]
    if query.shape[2] == 1:
        padding = keys >= 0 if step.gaps else None
        if left is not None:
            padding = (keys >= 0) & (keys >= step.first - left)
        return kernel(query, key, value, Mask(key_padding=padding))
    if left is not None:
        return kernel(query, key, value, Mask(predicate=_near(step, left), offset=0))
    old = key.shape[2] - len(step.fresh)
    padding = keys >= 0 if step.gaps else None
    far, near = (None, None) if padding is None else (padding[:, :old], padding[:, old:])
    before = kernel(query, key[:, :, :old], value[:, :, :old], Mask(key_padding=far))
    new = Mask(causal=True, offset=-step.fresh.start, key_padding=near)
    return merge([before, kernel(query, key[:, :, old:], value[:, :, old:], new)])


def _near(step: Step, left: int) -> Any:
    keys, first = step.keys, step.first
    assert keys is not None

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        column, row = keys[b, k], q + first
        return (column >= 0) & (column <= row) & (row - column <= left)

    return seen
