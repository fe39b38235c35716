"""One level of division: which pairs of token groups each of W workers keeps. Integers only.

Worker w holds the groups a + w (mod W) for every a of the interest set: its quorum. The interest set is a difference
cover, so every pair of groups is in some quorum. If two pairs of elements have the same cyclic difference, all workers
keep the first of them only, in combination order. So exactly one worker keeps each pair of groups.

Example: W = 7 and {0, 1, 3}. Worker 0 keeps the pairs of groups (0, 1), (0, 3), (1, 3) and its own group, worker 1 the
pairs (1, 2), (1, 4), (2, 4) and its own.

Source: CQS-Attention, IEEE Access 13 (2025) 35527 (Scheduler).
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import hf_attn_plugins.cqs.planning.difference_covers as covers

Pair = tuple[int, int]


@dataclass(frozen=True)
class Division:
    """The groups and pairs of `num_workers` workers under a checked interest set.

    Attributes:
        num_workers: W, also the number of token groups.
        interest_set: difference cover of Z_W; of pairs with one difference, its order decides which is kept.
    """

    num_workers: int
    interest_set: tuple[int, ...]

    @classmethod
    def of(cls, num_workers: int, interest_set: tuple[int, ...] | None = None) -> Division:
        """A division with the given interest set, which is checked; None takes the smallest known.

        Raises:
            ValueError: fewer than one worker, or the set is no difference cover.
        """
        known = covers.interest_set(num_workers)
        return cls(num_workers, known if interest_set is None else covers.check(interest_set, num_workers))

    def quorum(self, worker: int) -> list[int]:
        """The worker's groups in the interest set's order."""
        return [(element + worker) % self.num_workers for element in self.interest_set]

    def undistilled(self, worker: int) -> list[Pair]:
        """All pairs of groups in the quorum, smaller group first, in combination order."""
        return [(min(pair), max(pair)) for pair in itertools.combinations(self.quorum(worker), 2)]

    @functools.cached_property
    def _kept(self) -> list[tuple[int, bool]]:
        """(position in `undistilled`, whether the difference is W / 2) of the first pair with each difference."""
        seen: set[int] = set()
        kept = []
        for position, (a, b) in enumerate(itertools.combinations(self.interest_set, 2)):
            difference = min((a - b) % self.num_workers, (b - a) % self.num_workers)
            if difference not in seen:
                seen.add(difference)
                kept.append((position, 2 * difference == self.num_workers))
        return kept

    def distilled(self, worker: int) -> list[Pair]:
        """The pairs this worker keeps. Of two workers with the same pair, W / 2 apart, the lower one keeps it."""
        pairs = self.undistilled(worker)
        return [pairs[p] for p, half in self._kept if not half or 2 * worker < self.num_workers]

    def groups(self, worker: int) -> list[int]:
        """The distilled quorum: the groups of the kept pairs and the worker's own, ascending."""
        return sorted({worker}.union(*self.distilled(worker)))

    def keep(self, worker: int) -> list[list[bool]]:
        """A symmetric table over `groups(worker)`: True for the pairs it keeps and for its own diagonal block."""
        kept = {(worker, worker), *self.distilled(worker)}
        groups = self.groups(worker)
        return [[(min(a, b), max(a, b)) in kept for b in groups] for a in groups]


def group_range(group: int, num_tokens: int, num_workers: int) -> Pair:
    """First and end position of a token group. Sizes differ by at most one token; the larger groups come last."""
    size, larger = divmod(num_tokens, num_workers)
    begin = group * size + max(0, group - (num_workers - larger))
    return begin, begin + size + (group >= num_workers - larger)
