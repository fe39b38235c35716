"""Rows that every rank computes, over keys that lie on all ranks: Star's phase 2, decoding, later turns."""

from __future__ import annotations

from torch import Tensor

from hf_attn_plugins.masks import Window
from hf_attn_plugins.parallel.group import Group
from hf_attn_plugins.parallel.method import Kernel, Step, over_columns
from hf_attn_plugins.partial import Partial, merge


def later(
    query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: Kernel, group: Group
) -> Partial:
    """This rank's keys only, then one exchange of (out, lse), merged in the order of the ranks on all of them.

    Args:
        query: (B, Hq, T, D), the same on every rank; key, value: (B, Hkv, S, D and Dv), this rank's shard.
        window: of this layer, in columns.

    Source: Star Attention, arXiv 2411.17116, phase 2 (algorithm 2), with the merge of `partial.merge`.
    """
    assert step.keys is not None
    part = over_columns(query, key, value, step.columns, step.keys, window, step.gaps, kernel)
    return merge(group.gather_partials(part))
