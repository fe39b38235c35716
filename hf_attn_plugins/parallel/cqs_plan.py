"""CQS over ranks: whose worker needs which tokens, what goes over the wire, and who computes how much. Integers only.

The tokens lie in W groups, the workers are dealt to the ranks in runs, and a rank owns the groups of its own workers:
one stretch of the sequence. A round is one exchange of groups, the work of some workers, and one exchange of results.
Source: CQS-Attention, IEEE Access 13 (2025) 35527; the exchange between ranks that hold shards is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

from hf_attn_plugins.cqs.cost import CallShape
from hf_attn_plugins.cqs.division import group_range
from hf_attn_plugins.cqs.scheduler import Plan, default_workers, plan
from hf_attn_plugins.cqs.worker_share import Leaf, Range


@dataclass(frozen=True)
class Round:
    """What one rank needs in one round.

    Attributes:
        leaves: its workers of this round that have anything to compute.
        rows, keys: ascending token groups, as ranges of positions, whose queries, and whose keys and values, they read.
            Results are as many as `rows`.
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
    """CQS attention over `num_ranks` ranks, each of which owns a shard of the tokens.

    Attributes:
        division: the Scheduler's plan, of one level; W >= num_ranks.
        num_ranks: R.
        is_causal: whether rows see only keys at or before their own position; groups that nobody then reads stay home.
        num_rounds: exchanges a layer; 1 moves the fewest bytes, W / R holds one worker's tokens at a time.
        reach: positions before its own that a row sees (a causal sliding window), or None for all: groups out of reach
            of each other are left out.
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
        """The workers dealt to a rank. Later ranks get one more: in even divisions early workers have one pair more."""
        return range(*group_range(rank, self.num_workers, self.num_ranks))

    @functools.cached_property
    def shards(self) -> tuple[Range, ...]:
        """The positions every rank owns."""
        groups = self.division.token_groups
        dealt = [self.workers(rank) for rank in range(self.num_ranks)]
        return tuple((groups[mine.start].start, groups[mine.stop - 1].stop) for mine in dealt)

    def owner(self, group: Range) -> int:
        """The rank in whose shard a non-empty token group lies."""
        return next(rank for rank, (begin, end) in enumerate(self.shards) if begin <= group[0] and group[1] <= end)

    @functools.cached_property
    def rounds(self) -> tuple[tuple[Round, ...], ...]:
        """What every rank needs, round by round."""
        every = self.division.leaves()
        cut = every if self.reach is None else (leaf.within(self.reach) for leaf in every)
        leaves = {leaf.path[0]: leaf for leaf in cut}
        found = []
        for index in range(self.num_rounds):
            each = []
            for rank in range(self.num_ranks):
                mine = self.workers(rank)
                part = mine[slice(*group_range(index, len(mine), self.num_rounds))]
                each.append(_round([leaves[w] for w in part if w in leaves], self.is_causal))
            found.append(tuple(each))
        return tuple(found)

    def rows_moved(self, index: int, owner: int, worker: int) -> tuple[Range, ...]:
        """The groups whose queries rank `owner` sends to rank `worker` in a round, and whose results it gets back."""
        return self._moved(self.rounds[index][worker].rows, owner, worker)

    def keys_moved(self, index: int, owner: int, worker: int) -> tuple[Range, ...]:
        """The groups whose keys and values rank `owner` sends to rank `worker` in a round."""
        return self._moved(self.rounds[index][worker].keys, owner, worker)

    def _moved(self, needed: tuple[Range, ...], owner: int, worker: int) -> tuple[Range, ...]:
        return () if owner == worker else tuple(group for group in needed if self.owner(group) == owner)

    def pairs(self, rank: int) -> int:
        """(query, key) pairs of the blocks the rank computes; what a window hides inside of a block counts, too."""
        return sum(leaf.cells(self.is_causal) for each in self.rounds for leaf in each[rank].leaves)

    def balance(self) -> float:
        """The busiest rank's pairs over the mean rank's; 1 is perfect."""
        pairs = [self.pairs(rank) for rank in range(self.num_ranks)]
        return max(pairs) * self.num_ranks / sum(pairs) if sum(pairs) else 1.0

    def tokens_held(self, rank: int) -> tuple[int, int]:
        """Most tokens whose queries, and whose keys and values, a rank holds at once: its shard and what came in."""
        own = _size(self.shards[rank])
        others = range(self.num_ranks)
        rounds = range(self.num_rounds)
        rows = max(sum(_total(self.rows_moved(i, other, rank)) for other in others) for i in rounds)
        keys = max(sum(_total(self.keys_moved(i, other, rank)) for other in others) for i in rounds)
        return own + rows, own + keys

    def inputs(self, rank: int, shape: CallShape) -> Volume:
        """Queries, keys and values of one layer, on their way to the workers."""
        return self._volume(rank, shape.query_bytes, shape.key_bytes)

    def results(self, rank: int, shape: CallShape) -> Volume:
        """Partial outputs and their lse of one layer, on their way back to the owners."""
        back = self._volume(rank, shape.result_bytes, 0)
        return Volume(back.received, back.sent)

    def result_gradients(self, rank: int, shape: CallShape) -> Volume:
        """The backward pass of `results`: gradients of the owners' outputs, the global lse, and one number a row."""
        lse_bytes = shape.batch * shape.heads * max(4, shape.itemsize)
        return self._volume(rank, shape.result_bytes + lse_bytes, 0)

    def input_gradients(self, rank: int, shape: CallShape) -> Volume:
        """The backward pass of `inputs`: gradients of queries, keys and values, back to their owners."""
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
    """Deal CQS attention over `num_tokens` positions to ranks.

    Args:
        num_tokens: N >= 0.
        num_ranks: R >= 1.
        workers: W >= R, or None to choose by `choose_workers`.
        interest_set: difference cover of Z_W; None takes the smallest known.
        is_causal: whether rows see only keys at or before their own position.
        rounds: exchanges a layer, 1 .. the most workers of a rank.
        reach: of a causal sliding window, positions before its own that a row sees; None for no window.

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


def choose_workers(num_tokens: int, num_ranks: int) -> int:
    """The number of workers to take where none is named: of 1 .. 3 a rank those that move the least, then balance best.

    Multiples of the ranks, so that shards are equal. One rank moves nothing, so there the length decides as everywhere.
    """
    if num_ranks == 1:
        return default_workers(num_tokens)

    def cost(count: int) -> tuple[int, float]:
        trial = RankPlan(plan(12 * num_ranks, count), num_ranks)
        token = CallShape(heads=4, kv_heads=1, head_dim=128, head_dim_v=128)  # as in most models of today
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
