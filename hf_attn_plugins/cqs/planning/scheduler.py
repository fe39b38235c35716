"""The Scheduler: which worker computes which pairs of tokens, in the paper's terms. Integers only."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import hf_attn_plugins.cqs.planning.difference_covers as covers
from hf_attn_plugins.cqs.planning.division import Division, Pair, group_range
from hf_attn_plugins.cqs.planning.worker_share import Leaf

# `default_workers`: below this many tokens per group, starting a kernel call costs more than the division is worth.
LEAST_GROUP = 1024
MOST_DEFAULT_WORKERS = 31


@dataclass(frozen=True)
class Plan:
    """A division of all ordered pairs of `num_tokens` positions among independent workers.

    The lists describe the first level and are made anew at each access. `leaves()` takes all levels.

    Attributes:
        num_tokens: N >= 0.
        levels: one `Division` per level of the recursion, at least one.
    """

    num_tokens: int
    levels: tuple[Division, ...]

    @property
    def num_workers(self) -> int:
        """W of the first level."""
        return self.levels[0].num_workers

    @property
    def interest_set(self) -> tuple[int, ...]:
        """The interest set of the first level."""
        return self.levels[0].interest_set

    @property
    def token_groups(self) -> list[range]:
        """The positions of each of the W token groups; groups are empty where there are fewer tokens than workers."""
        return [range(*group_range(g, self.num_tokens, self.num_workers)) for g in range(self.num_workers)]

    @property
    def quorums(self) -> list[list[int]]:
        """The cyclic quorum set: per worker its groups, in the interest set's order."""
        return [self.levels[0].quorum(w) for w in range(self.num_workers)]

    @property
    def undistilled_pairs(self) -> list[list[Pair]]:
        """Per worker all pairs of its quorum; together they contain duplicates."""
        return [self.levels[0].undistilled(w) for w in range(self.num_workers)]

    @property
    def distilled_pairs(self) -> list[list[Pair]]:
        """Per worker the pairs it keeps; together every pair of different groups exactly once."""
        return [self.levels[0].distilled(w) for w in range(self.num_workers)]

    @property
    def distilled_quorums(self) -> list[list[int]]:
        """Per worker the groups it needs: those of its kept pairs and its own, ascending."""
        return [self.levels[0].groups(w) for w in range(self.num_workers)]

    @property
    def keep(self) -> list[list[list[bool]]]:
        """Per worker a symmetric table over its distilled quorum: True where it computes that block."""
        return [self.levels[0].keep(w) for w in range(self.num_workers)]

    @property
    def material(self) -> list[list[int]]:
        """Per worker the positions of its tokens, ascending. `lengths` has their numbers alone."""
        return [self._material(w) for w in range(self.num_workers)]

    @property
    def lengths(self) -> list[int]:
        """Per worker the number of its tokens (subsequence lengths)."""
        groups = self.token_groups
        return [sum(len(groups[g]) for g in quorum) for quorum in self.distilled_quorums]

    def _material(self, worker: int) -> list[int]:
        groups = self.token_groups
        return list(itertools.chain.from_iterable(groups[g] for g in self.levels[0].groups(worker)))

    def tasks(self, worker: int) -> list[Pair]:
        """All token pairs the worker computes, its diagonal block first: O(N^2 / W) pairs, for demonstration."""
        groups = self.token_groups
        own = [(a, b) for a in groups[worker] for b in groups[worker]]
        return own + _both_ways(self.levels[0].distilled(worker), groups)

    def bans(self, worker: int) -> list[Pair]:
        """All token pairs of its material that the worker must not compute, in no particular order."""
        division, groups = self.levels[0], self.token_groups
        own = division.groups(worker)
        blocks = set(itertools.combinations_with_replacement(own, 2)) - {(worker, worker), *division.distilled(worker)}
        banned: list[Pair] = []
        for a, b in blocks:
            diagonal = [(s, t) for s in groups[a] for t in groups[a]]
            banned += diagonal if a == b else _both_ways([(a, b)], groups)
        return banned

    def local_bans(self, worker: int) -> list[Pair]:
        """`bans` with each position replaced by its index in the worker's material."""
        place = {token: index for index, token in enumerate(self._material(worker))}
        return [(place[a], place[b]) for a, b in self.bans(worker)]

    def leaves(self) -> Iterator[Leaf]:
        """The workers of the last level, without those that have nothing to compute."""
        whole = ((0, self.num_tokens),) if self.num_tokens else ()
        leaves: Iterator[Leaf] = iter([Leaf((), whole, ((True,),) if whole else ())])
        for division in self.levels:
            leaves = itertools.chain.from_iterable(map(_divider(division), leaves))
        return leaves

    def balance(self, is_causal: bool = False) -> float:
        """Cells of the largest leaf divided by those of the mean leaf; 1 is perfect."""
        cells = [leaf.cells(is_causal) for leaf in self.leaves()]
        return max(cells) / statistics.mean(cells) if cells else 1.0


def plan(
    num_tokens: int,
    num_workers: int | Sequence[int],
    interest_set: Sequence[int] | Sequence[Sequence[int] | None] | None = None,
) -> Plan:
    """Plan exact attention over `num_tokens` positions by independent workers.

    Args:
        num_tokens: N >= 0.
        num_workers: W >= 1, or one number per level of a recursive division, outermost first.
        interest_set: a difference cover of Z_W; of pairs with one difference, its order decides which is kept. None
            takes the smallest known. For several levels: one set, or None, per level.

    Raises:
        ValueError: the length is negative, a number of workers is missing or below 1, or a set is no difference cover.

    Source: CQS-Attention, IEEE Access 13 (2025) 35527 (Scheduler); recursion: arXiv 2604.20819.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens}: a length of at least 0 is needed.")
    if isinstance(num_workers, int):
        counts: Sequence[int] = (num_workers,)
        sets: Sequence = (interest_set,)
    else:
        counts = tuple(num_workers)
        sets = (None,) * len(counts) if interest_set is None else tuple(interest_set)
    if not counts or len(sets) != len(counts):
        raise ValueError(f"num_workers={num_workers} needs one interest set, or None, per level; got {interest_set}.")
    levels = (Division.of(w, None if s is None else tuple(s)) for w, s in zip(counts, sets, strict=True))
    return Plan(num_tokens, tuple(levels))


def default_workers(num_tokens: int) -> int:
    """The number of workers for one device: the largest Singer size of 7 .. 31 with `LEAST_GROUP` tokens per group.

    7 where no size has. Example: 8192 tokens have 7 workers, 32768 tokens have 31.
    """
    sizes = covers.singer_sizes(MOST_DEFAULT_WORKERS)
    return max(size for size in sizes if size == sizes[0] or num_tokens >= size * LEAST_GROUP)


def _both_ways(blocks: list[Pair], groups: list[range]) -> list[Pair]:
    """Token pairs of off-diagonal blocks, each followed by its mirror image."""
    return [pair for a, b in blocks for s in groups[a] for t in groups[b] for pair in ((s, t), (t, s))]


def _divider(division: Division) -> Callable[[Leaf], Iterator[Leaf]]:
    return lambda leaf: leaf.divide(division)
