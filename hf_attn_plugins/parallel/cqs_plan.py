"""CQS over ranks: which tokens each worker needs, which bytes are sent, and how many pairs each rank computes.

Integers only. The tokens are divided into W groups, one per worker. Every rank gets a run of consecutive workers and
owns their groups, which are one contiguous shard of the sequence. A round is one exchange of groups, the work of some
workers, and one exchange of results. Example: W=4 on 2 ranks, N=8: rank 0 has workers 0, 1 and owns positions 0 .. 3.
Source: CQS-Attention, IEEE Access 13 (2025) 35527; the exchange between ranks that hold shards is ours.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.cqs.planning.division import group_range
from hf_attn_plugins.cqs.planning.scheduler import Plan, default_workers, plan
from hf_attn_plugins.cqs.planning.worker_share import Leaf, Range


@dataclass(frozen=True)
class Round:
    """What one rank needs in one round.

    Attributes:
        leaves: the shares of this rank's workers in this round; workers without pairs are left out.
        rows: the groups, as ascending ranges of positions, whose queries these workers read. Each gives one result.
        keys: likewise the groups whose keys and values they read.
    """

    leaves: tuple[Leaf, ...]
    rows: tuple[Range, ...]
    keys: tuple[Range, ...]


@dataclass(frozen=True)
class Volume:
    """Bytes that one rank sends to, and receives from, other ranks in one layer."""

    sent: int
    received: int


@dataclass(frozen=True)
class RankPlan:
    """The plan of CQS attention over `num_ranks` ranks, each of which owns one shard of the tokens.

    Attributes:
        division: the Scheduler's plan, of one level; W >= num_ranks.
        num_ranks: R.
        is_causal: whether rows see only keys at or before their own position. Groups that no worker reads then are not
            sent.
        num_rounds: exchanges per layer. 1 sends the fewest bytes; W / R keeps the tokens of one worker at a time.
        reach: of a causal sliding window, how many positions before its own a row sees; None for all. Pairs of groups
            that are further apart are left out.
    """

    division: Plan
    num_ranks: int
    is_causal: bool = True
    num_rounds: int = 1
    reach: int | None = None

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.division.num_tokens

    @property
    def num_workers(self) -> int:
        """W."""
        return self.division.num_workers

    def workers(self, rank: int) -> range:
        """The workers of a rank; later ranks get the remainder, since early workers have one pair more if W is even."""
        return range(*group_range(rank, self.num_workers, self.num_ranks))

    @functools.cached_property
    def shards(self) -> tuple[Range, ...]:
        """(first, end) of the positions that each rank owns."""
        groups = self.division.token_groups
        dealt = [self.workers(rank) for rank in range(self.num_ranks)]
        return tuple((groups[mine.start].start, groups[mine.stop - 1].stop) for mine in dealt)

    def owner(self, group: Range) -> int:
        """The rank in whose shard a non-empty token group lies."""
        return bisect.bisect_left(self._ends, group[1])

    @functools.cached_property
    def _ends(self) -> list[int]:
        return [end for _, end in self.shards]

    @functools.cached_property
    def rounds(self) -> tuple[tuple[Round, ...], ...]:
        """rounds[index][rank]: what the rank needs in the round."""
        every = self.division.leaves()
        cut = every if self.reach is None else (leaf.within(self.reach) for leaf in every)
        leaves = {leaf.path[0]: leaf for leaf in cut}
        rounds = []
        for index in range(self.num_rounds):
            each = []
            for rank in range(self.num_ranks):
                mine = self.workers(rank)
                part = mine[slice(*group_range(index, len(mine), self.num_rounds))]
                each.append(_round([leaves[w] for w in part if w in leaves], self.is_causal))
            rounds.append(tuple(each))
        return tuple(rounds)

    def rows_moved(self, index: int, owner: int, worker: int) -> tuple[Range, ...]:
        """The groups whose queries rank `owner` sends to `worker` in round `index`; their results are sent back."""
        return self._moved(self.rounds[index][worker].rows, owner, worker)

    def keys_moved(self, index: int, owner: int, worker: int) -> tuple[Range, ...]:
        """The groups whose keys and values rank `owner` sends to rank `worker` in round `index`."""
        return self._moved(self.rounds[index][worker].keys, owner, worker)

    def _moved(self, needed: tuple[Range, ...], owner: int, worker: int) -> tuple[Range, ...]:
        return () if owner == worker else tuple(group for group in needed if self.owner(group) == owner)

    def pairs(self, rank: int) -> int:
        """(query, key) pairs that the rank computes, those included that a window hides inside a group pair."""
        return sum(leaf.cells(self.is_causal) for each in self.rounds for leaf in each[rank].leaves)

    def balance(self) -> float:
        """max(pairs) / mean(pairs) over the ranks; 1.0 if all ranks compute the same number of pairs."""
        pairs = [self.pairs(rank) for rank in range(self.num_ranks)]
        return max(pairs) * self.num_ranks / sum(pairs) if sum(pairs) else 1.0

    def tokens_held(self, rank: int) -> tuple[int, int]:
        """Peak (tokens with queries, tokens with keys and values) on the rank: its shard and the received groups."""
        own = _size(self.shards[rank])
        others = range(self.num_ranks)
        rounds = range(self.num_rounds)
        rows = max(sum(_total(self.rows_moved(i, other, rank)) for other in others) for i in rounds)
        keys = max(sum(_total(self.keys_moved(i, other, rank)) for other in others) for i in rounds)
        return own + rows, own + keys

    def inputs(self, rank: int, shape: CallShape) -> Volume:
        """Bytes of queries, keys and values in one layer, from the owners to the workers."""
        return self._volume(rank, shape.query_bytes, shape.key_bytes)

    def results(self, rank: int, shape: CallShape) -> Volume:
        """Bytes of partial outputs and lse in one layer, from the workers to the owners."""
        back = self._volume(rank, shape.result_bytes, 0)
        return Volume(back.received, back.sent)

    def result_gradients(self, rank: int, shape: CallShape) -> Volume:
        """Bytes of the backward pass of `results`: gradient of the output, merged lse, and one more element per row."""
        lse_bytes = shape.batch * shape.heads * max(4, shape.itemsize)
        return self._volume(rank, shape.result_bytes + lse_bytes, 0)

    def input_gradients(self, rank: int, shape: CallShape) -> Volume:
        """Bytes of the backward pass of `inputs`: gradients of queries, keys and values, to their owners."""
        back = self.inputs(rank, shape)
        return Volume(back.received, back.sent)

    def _volume(self, rank: int, row_bytes: int, key_bytes: int) -> Volume:
        sent = received = 0
        for index in range(self.num_rounds):
            for other in range(self.num_ranks):
                sent += row_bytes * _total(self.rows_moved(index, rank, other))
                sent += key_bytes * _total(self.keys_moved(index, rank, other))
                received += row_bytes * _total(self.rows_moved(index, other, rank))
                received += key_bytes * _total(self.keys_moved(index, other, rank))
        return Volume(sent, received)


@functools.lru_cache(maxsize=64)
def rank_plan(
    num_tokens: int,
    num_ranks: int,
    workers: int | None = None,
    interest_set: tuple[int, ...] | None = None,
    is_causal: bool = True,
    rounds: int = 1,
    reach: int | None = None,
) -> RankPlan:
    """Plan CQS attention over `num_tokens` positions and `num_ranks` ranks.

    Args:
        num_tokens: N >= 0.
        num_ranks: R >= 1.
        workers: W >= R, or None to choose by `choose_workers`.
        interest_set: difference cover of Z_W; None takes the smallest known.
        is_causal: whether rows see only keys at or before their own position.
        rounds: exchanges per layer, from 1 to ceil(W / R).
        reach: of a causal sliding window, how many positions before its own a row sees; None for no window.

    Raises:
        ValueError: a negative length, no rank, fewer workers than ranks, a set that is no cover, or too many rounds.
    """
    if num_ranks < 1:
        raise ValueError(f"{num_ranks} ranks: at least 1 process is needed.")
    count = choose_workers(num_tokens, num_ranks) if workers is None else workers
    if count < num_ranks:
        raise ValueError(
            f"workers={count} on {num_ranks} ranks: {num_ranks - count} of them would own no token and compute "
            f"nothing. Take workers={num_ranks} or more, or start {count} processes."
        )
    most = -(-count // num_ranks)
    if not 1 <= rounds <= most:
        raise ValueError(f"rounds={rounds}: a rank has at most {most} of {count} workers; take 1 .. {most} rounds.")
    return RankPlan(plan(num_tokens, count, interest_set), num_ranks, is_causal, rounds, reach if is_causal else None)


@functools.lru_cache(maxsize=64)
def choose_workers(num_tokens: int, num_ranks: int) -> int:
    """The number of workers W if the user names none: R, 2 R or 3 R.

    The fewest bytes received and sent by the busiest rank decide, then the best balance. Multiples of R give shards of
    equal length. One rank sends nothing; there `scheduler.default_workers` decides by the length.
    """
    if num_ranks == 1:
        return default_workers(num_tokens)

    def cost(count: int) -> tuple[int, float]:
        trial = RankPlan(plan(12 * num_ranks, count), num_ranks)
        token = CallShape(heads=4, kv_heads=1, head_dim=128, head_dim_v=128)
        moved = max(trial.inputs(r, token).received + trial.results(r, token).sent for r in range(num_ranks))
        return moved, trial.balance()

    return min((num_ranks * each for each in (1, 2, 3)), key=cost)


def _round(leaves: Sequence[Leaf], is_causal: bool) -> Round:
    rows = {group for leaf in leaves for group in leaf.rows(is_causal)}
    keys = {group for leaf in leaves for group in leaf.keys(is_causal)}
    return Round(tuple(leaves), tuple(sorted(rows)), tuple(sorted(keys)))


def _size(span: Range) -> int:
    return span[1] - span[0]


def _total(groups: Sequence[Range]) -> int:
    return sum(map(_size, groups))
