"""Long later turns: every rank computes a share of the turn's tokens, and all keys stay on the ranks that store them.

A later turn is a forward of several tokens behind a filled cache: a second question, a chunk of a long prompt, the
candidates of assisted decoding. Its rows see all columns before them, whatever the plugin. It is computed in one of two
ways, and `link.least_turn` says from how many tokens on the second one takes less time:

- by every rank (`decode.later`): each rank computes all tokens; one exchange per layer merges (out, lse).
- dealt (`attention` below): each rank computes its own tokens. In every layer the ranks gather the queries of all
  tokens, each rank attends to the keys that it stores, and every row's (out, lse) returns to the rank that has its
  token, which merges. The new keys of a token are stored by the rank that computed it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Window
from hf_attn_plugins.core.partial import Partial, lse_dtype, merge
from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.parallel.comm.collectives import anchor_of, swap, tie
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.decode import own_keys
from hf_attn_plugins.parallel.heads import at_runs, in_order
from hf_attn_plugins.parallel.method import Cost, Layout, Step, triangle
from hf_attn_plugins.parallel.partition import level, mirrored

EXCHANGES = ("queries", "results")  # names in `Traffic` of what a dealt turn exchanges in every layer


def dealt_runs(count: int, loads: Sequence[int]) -> list[list[range]]:
    """The tokens 0 .. count-1 of a turn as runs of each rank: the shares of `partition.mirrored`.

    Shares differ by at most one token, and every rank's new keys are seen by about the same number of rows. The rank
    that stores the fewest keys gets the longest share; among equal ranks the lower one comes first.

    Args:
        count: tokens of the turn.
        loads: keys per batch row that each rank stores already.

    Example: `dealt_runs(5, [9, 8])` is [[range(2, 4)], [range(0, 2), range(4, 5)]].
    """
    shares = sorted(mirrored(count, len(loads)), key=lambda runs: -sum(map(len, runs)))
    order = sorted(range(len(loads)), key=lambda rank: (loads[rank], rank))
    return [shares[order.index(rank)] for rank in range(len(loads))]


def deal(batch: int, count: int, loads: Sequence[int], rank: int) -> Layout | None:
    """The layout of a turn on `rank`; None if there is one rank, or fewer tokens than ranks.

    Args:
        batch: rows of the batch.
        count, loads: as in `dealt_runs`.
        rank: this rank.
    """
    dealt = dealt_runs(count, loads)
    if len(loads) == 1 or not all(dealt):
        return None
    columns = torch.cat([torch.arange(run.start, run.stop) for run in dealt[rank]])
    slots = torch.arange(len(columns))
    shares = [sum(map(len, runs)) for runs in dealt]
    return Layout(columns.expand(batch, -1), slots, slots, shares, fresh=tuple(dealt[rank]), extra=dealt)


def attention(
    query: Tensor, key: Tensor, value: Tensor, window: Window, step: Step, kernel: BoundAttend, group: Group
) -> Partial:
    """Attention of this rank's rows of a dealt turn over the keys of all ranks.

    Args:
        query: (B, Hq, T, D), one row per slot of `step.layout`.
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), this rank's shard; its tokens of this turn come last.
        window: (left, right) of this layer, in columns of the prompt.
        step: the forward under way, with the layout of `deal`.
        kernel: the attention kernel with its scale, softcap and dropout.
        group: the ranks.

    Returns:
        `Partial` of the T rows over all keys, merged in the order of the ranks.

    Raises:
        RankError: a rank is gone or does not answer.

    Source: phase 2 of Star Attention, arXiv 2411.17116, algorithm 2, with its rows dealt over the ranks.
    """
    assert step.layout is not None
    dealt = step.layout.extra
    queries = in_order(group.all_gather(query, step.layout.loads, 2, what="queries"), dealt)
    part = own_keys(queries, key, value, window, step, kernel)
    # The lse goes first: it has the larger element size, so that both lie aligned in the message.
    back = [[at_runs(x, runs) for x in (part.lse, part.out)] for runs in dealt]
    lead = tuple(query.shape[:3])
    expected = [(lead, lse_dtype(query)), ((*lead, value.shape[3]), query.dtype)]
    arrived, token = swap(group, back, [expected] * group.size, anchor_of(queries, key, value), what="results")
    merged = merge([Partial(out, lse) for lse, out in arrived])
    return Partial(tie(merged.out, queries, token), merged.lse)


def costs(count: int, loads: Sequence[int], shape: CallShape, *, is_dealt: bool = True) -> list[Cost]:
    """The cost of a later turn without padding, in one layer with full attention.

    With R ranks, T tokens and t of them on this rank, dealt: a rank sends (R - 1) t queries, t padded to the longest
    share, and T - t results; it receives as many queries, and (R - 1) t results. By every rank: it sends and receives
    (R - 1) T results.

    Args:
        count: T, tokens of the turn.
        loads: keys per batch row that each rank stores before the turn.
        shape: heads, head sizes, bytes per element and batch.
        is_dealt: whether the turn is dealt; False for a turn that every rank computes.

    Returns:
        One `Cost` per rank. `pairs` counts those with the keys of this rank, `cache` all keys after the turn.

    Raises:
        ValueError: a turn to deal that has fewer tokens than there are ranks.
    """
    ranks = len(loads)
    dealt = dealt_runs(count, loads) if is_dealt else [[run] for run in level(loads, count)]
    if is_dealt and not all(dealt):
        raise ValueError(f"{count} tokens are too few to be dealt over {ranks} ranks: at least {ranks} are needed.")
    shares = [sum(map(len, runs)) for runs in dealt]
    longest, found = max(shares), []
    for load, share, runs in zip(loads, shares, dealt, strict=True):
        new = sum(triangle(count - run.start) - triangle(count - run.stop) for run in runs)
        queries, rows = ((ranks - 1) * longest * shape.query_bytes, share) if is_dealt else (0, count)
        sent = (count - share if is_dealt else (ranks - 1) * count) * shape.result_bytes
        received = (ranks - 1) * rows * shape.result_bytes
        own = rows * (shape.query_bytes + shape.key_bytes + shape.result_bytes)
        gathered = count * (shape.query_bytes + shape.result_bytes) if is_dealt else 0
        found.append(
            Cost(
                sent=queries + sent,
                received=queries + received,
                held=own + gathered + received + (load + share) * shape.key_bytes,
                pairs=count * load + new,
                rows=rows,
                cache=(load + share) * shape.key_bytes,
                decode=(ranks - 1) * shape.result_bytes,
            )
        )
    return found
