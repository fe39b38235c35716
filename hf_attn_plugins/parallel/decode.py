"""Attention of rows that every rank has over keys that are sharded: decoding, short later turns, Star's phase 2.

Every rank attends to its own keys and gets a partial result (out, lse). One all-gather and one merge then give every
rank the result over all keys. The whole method in plain torch, two ranks in one process:

    >>> import torch
    >>> query = torch.tensor([[1.0, 0.0]])  # one row, head_dim 2, the same on both ranks
    >>> keys = torch.tensor([[3.0, 0.0], [0.0, 1.0], [2.0, 2.0]])
    >>> values = torch.tensor([[1.0], [2.0], [4.0]])
    >>> shards = [(keys[:2], values[:2]), (keys[2:], values[2:])]  # rank 0 stores two keys, rank 1 stores one
    >>> def attend(query, key, value):
    ...     scores = query @ key.T
    ...     return scores.softmax(-1) @ value, scores.logsumexp(-1)
    >>> partials = [attend(query, key, value) for key, value in shards]  # each rank alone
    >>> out, lse = (torch.stack(x) for x in zip(*partials))  # the all-gather: out (2, 1, 1), lse (2, 1)
    >>> weight = (lse - lse.amax(0)).exp()  # exp(lse) up to one factor per row, so that it cannot overflow
    >>> merged = (weight.unsqueeze(-1) * out).sum(0) / weight.sum(0).unsqueeze(-1)
    >>> [round(x.item(), 4) for x in lse]
    [3.0486, 2.0]
    >>> round(merged.item(), 4), round(attend(query, keys, values)[0].item(), 4)
    (1.8136, 1.8136)
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.method import Step


def later(
    query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
) -> Partial:
    """Attend to this rank's keys, exchange (out, lse), and merge in the order of the ranks.

    Args:
        query: (B, Hq, T, D), the same on every rank.
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), this rank's shard.
        window: (left, right) of this layer, in columns of the prompt.
        step: the forward under way; `step.keys` says which column each key has.
        kernel: the attention kernel with its scale, softcap and dropout.
        group: the ranks.

    Returns:
        `Partial` over all keys. Every rank merges in the same order, so every rank has the same result.

    Raises:
        RankError: a rank is gone or does not answer.

    Source: Star Attention, arXiv 2411.17116, algorithm 2 (phase 2), with the merge of `core.partial.merge`.
    """
    return merge(group.gather_partials(own_keys(query, key, value, window, step, kernel)))


def own_keys(query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend) -> Partial:
    """Attention of this forward's rows over the keys of this rank, at any place in the prompt.

    Keys that were stored before this forward get no causal mask: all of them are earlier than every row. A causal mask
    that aligns the last row with the shard's last key would hide keys that the row must see.
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
    end = key.shape[2] - sum(map(len, step.fresh))
    padding = keys >= 0 if step.gaps else None
    before = Mask(key_padding=None if padding is None else padding[:, :end])
    parts = [kernel(query, key[:, :, :end], value[:, :, :end], before)]
    for run in step.fresh:  # the keys of consecutive rows of this forward
        begin, end = end, end + len(run)
        new = Mask(causal=True, offset=-run.start, key_padding=None if padding is None else padding[:, begin:end])
        parts.append(kernel(query, key[:, :, begin:end], value[:, :, begin:end], new))
    return merge(parts)


def _near(step: Step, left: int) -> Any:
    keys, first = step.keys, step.first
    assert keys is not None

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        column, row = keys[b, k], q + first
        return (column >= 0) & (column <= row) & (row - column <= left)

    return seen
