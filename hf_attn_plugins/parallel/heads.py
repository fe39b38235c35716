"""Dense attention with heads dealt over the ranks: heads are exchanged for tokens before attention, and back after it.

Each rank gets all tokens of some query heads, with the key heads that they read, attends once, and returns every
token's results to the rank that has the token. A key head goes to every rank that has one of its query heads, so the
number of ranks may exceed the number of key heads. A rank beyond the number of query heads gets none.

Source: DeepSpeed Ulysses, arXiv 2309.14509.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.partial import Partial, lse_dtype
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.comm.collectives import anchor_of, swap, tie
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.partition import contiguous


class HeadShare(NamedTuple):
    """The heads of one rank.

    Attributes:
        query: query heads.
        key: key heads that they read.
        group: query heads per key head in the model.
    """

    query: range
    key: range
    group: int

    @property
    def is_grouped(self) -> bool:
        """Whether each key head of the share has equally many of the query heads."""
        counts = {sum(head // self.group == key for head in self.query) for key in self.key}
        return len(counts) <= 1


def deal_heads(heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """One run of query heads per rank; the lengths differ by at most one.

    Example: 4 query heads of 2 key heads on 3 ranks are the query heads 0 1, 2, 3 with the key heads 0, 1, 1.
    """
    group = heads // kv_heads
    return [
        HeadShare(run, range(run.start // group, (run.stop - 1) // group + 1) if run else range(0), group)
        for run in contiguous(heads, ranks)
    ]


def moved(shape: CallShape, loads: Sequence[int], rank: int) -> tuple[int, int]:
    """(bytes sent, bytes received) by one rank in one layer, both exchanges together.

    Args:
        shape: heads, head sizes and bytes per element.
        loads: tokens of each rank.
        rank: the rank that is counted.
    """
    shares, others = deal_heads(shape.heads, shape.kv_heads, len(loads)), [r for r in range(len(loads)) if r != rank]

    def inputs(share: HeadShare) -> int:
        query, key = shape.query_bytes // shape.heads, shape.key_bytes // shape.kv_heads
        return len(share.query) * query + len(share.key) * key

    def results(share: HeadShare) -> int:
        return len(share.query) * shape.result_bytes // shape.heads

    foreign = sum(loads[other] for other in others)
    sent = loads[rank] * sum(inputs(shares[other]) for other in others) + foreign * results(shares[rank])
    received = foreign * inputs(shares[rank]) + loads[rank] * sum(results(shares[other]) for other in others)
    return sent, received


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dealt: list[list[range]],
    group: Group,
    attend: Callable[[Tensor, Tensor, Tensor], Partial],
) -> Partial:
    """Attention of this rank's tokens over all tokens; differentiable. Every rank must call it.

    Args:
        query: (B, Hq, T, D), the tokens `dealt[group.rank]`, run after run.
        key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), the same tokens.
        dealt: the runs of tokens of each rank.
        group: the ranks.
        attend: attention of all tokens of some heads, (B, h, L, D), in order.

    Returns:
        `Partial` of the T tokens, all heads.
    """
    batch, heads, mine, head_dim = query.shape
    head_dim_v, dtype, wide = value.shape[3], query.dtype, lse_dtype(query)
    shares, loads = deal_heads(heads, key.shape[1], group.size), [sum(map(len, runs)) for runs in dealt]
    own = shares[group.rank]
    given = [[query[:, _cut(to.query)], key[:, _cut(to.key)], value[:, _cut(to.key)]] for to in shares]
    taken = [
        [
            ((batch, len(run), load, width), dtype)
            for run, width in ((own.query, head_dim), (own.key, head_dim), (own.key, head_dim_v))
        ]
        for load in loads
    ]
    arrived, arrival = swap(group, given, taken, anchor_of(query, key, value), what="heads")
    queries, keys, values = (in_order(shards, dealt) for shards in zip(*arrived, strict=True))
    if not own.query:
        part = Partial.empty(queries, head_dim_v)
    else:
        if not own.is_grouped:  # kernels take equally many query heads per key head: give every query head a key head
            index = torch.tensor([head // own.group - own.key.start for head in own.query], device=keys.device)
            keys, values = keys.index_select(1, index), values.index_select(1, index)
        part = attend(queries, keys, values)
    # The lse goes first: it has the larger element size, so that both lie aligned in the message.
    back = [[at_runs(x, runs) for x in (part.lse, part.out)] for runs in dealt]
    sizes = [(batch, len(share.query), mine) for share in shares]
    shapes = [[(size, wide), ((*size, head_dim_v), dtype)] for size in sizes]
    returned, departure = swap(group, back, shapes, tie(query, arrival), what="heads back")
    lse, out = (torch.cat(pieces, 1) for pieces in zip(*returned, strict=True))
    return Partial(tie(out, arrival, departure), lse)


def in_order(shards: Sequence[Tensor], dealt: list[list[range]]) -> Tensor:
    """The tokens of all ranks, (B, H, L, D), in the order of the prompt, from (B, H, T, D) of each rank."""
    runs: list[tuple[int, Tensor]] = []
    for shard, ranges in zip(shards, dealt, strict=True):
        pieces = shard.split([len(run) for run in ranges], 2)
        runs += zip((run.start for run in ranges), pieces, strict=True)
    return torch.cat([piece for _, piece in sorted(runs, key=lambda pair: pair[0])], 2)


def at_runs(tensor: Tensor, runs: list[range]) -> Tensor:
    """The tokens of some runs, run after run, from (B, H, L, ...) of all tokens."""
    return torch.cat([tensor[:, :, run.start : run.stop] for run in runs], 2)


def _cut(run: range) -> slice:
    return slice(run.start, run.stop)
