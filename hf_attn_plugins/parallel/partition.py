"""How tokens, blocks and generated keys are divided among ranks. Integers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def contiguous(count: int, ranks: int) -> list[range]:
    """Divide 0 .. count-1 into one run per rank; lengths differ by at most one, longer runs come first.

    Example: `contiguous(7, 3)` is [range(0, 3), range(3, 5), range(5, 7)].

    Raises:
        ValueError: fewer than one rank, or a negative count.
    """
    _check(count, ranks)
    least, more = divmod(count, ranks)
    starts = [rank * least + min(rank, more) for rank in range(ranks + 1)]
    return [range(first, end) for first, end in itertools.pairwise(starts)]


def blocks(context: int, block_size: int, ranks: int) -> list[range]:
    """Divide the blocks of a context into one run of blocks per rank, so that the longest run has the fewest tokens.

    The numbers of blocks differ by at most one. The last block may be shorter than the others; the additional block
    then goes to the last ranks if that makes the longest run shorter. The first rank always has the first block.

    Args:
        context: tokens.
        block_size: tokens per block.
        ranks: number of ranks.

    Example: `blocks(34, 8, 2)` has 5 blocks of 8, 8, 8, 8 and 2 tokens. It is [range(0, 2), range(2, 5)]: 16 tokens for
    rank 0 and 18 for rank 1, where [range(0, 3), range(3, 5)] would be 24 and 10.
    """
    count = -(-context // block_size)
    early = contiguous(count, ranks)
    if count < ranks or not count % ranks:
        return early
    late = [range(count - run.stop, count - run.start) for run in reversed(early)]

    def longest(runs: Sequence[range]) -> int:
        return max(min(run.stop * block_size, context) - run.start * block_size for run in runs if run)

    return min(early, late, key=longest)


def mirrored(count: int, ranks: int) -> list[list[range]]:
    """Divide `count` tokens so that causal attention costs every rank about the same.

    The tokens are divided into 2 x ranks runs, and rank r gets runs r and 2 x ranks - 1 - r. A late run sees more keys
    than an early one, so each rank gets one of both. Adjacent runs of one rank are joined; empty runs are left out.

    Example: `mirrored(8, 2)` is [[range(0, 2), range(6, 8)], [range(2, 6)]].
    """
    runs = contiguous(count, 2 * _check(count, ranks))
    dealt = []
    for rank in range(ranks):
        early, late = runs[rank], runs[2 * ranks - 1 - rank]
        pair = [range(early.start, late.stop)] if early.stop == late.start else [early, late]
        dealt.append([run for run in pair if run])
    return dealt


def level(loads: Sequence[int], count: int) -> list[range]:
    """Divide `count` new tokens into one run per rank, so that the largest load becomes as small as possible.

    The least loaded ranks get tokens first; among equal loads the lower rank comes first. Tokens that are generated one
    at a time are therefore stored in turn by all ranks once the loads are equal.

    Args:
        loads: tokens that each rank stores already.
        count: new tokens.

    Example: `level([5, 3, 3], 3)` is [range(0, 0), range(0, 2), range(2, 3)].
    """
    ranks = len(loads)
    _check(count, ranks)
    order = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
    # Raise the k least loaded ranks to one height; take the smallest k for which the next rank's load is not below it.
    share = [0] * ranks
    for filled in range(1, ranks + 1):
        chosen = order[:filled]
        height, more = divmod(sum(loads[rank] for rank in chosen) + count, filled)
        if filled == ranks or height < loads[order[filled]] or (height == loads[order[filled]] and not more):
            for index, rank in enumerate(chosen):
                share[rank] = height + (index < more) - loads[rank]
            break
    starts = [sum(share[:rank]) for rank in range(ranks + 1)]
    return [range(first, end) for first, end in itertools.pairwise(starts)]


def _check(count: int, ranks: int) -> int:
    if ranks < 1:
        raise ValueError(f"{ranks} ranks: at least 1 process is needed.")
    if count < 0:
        raise ValueError(f"count={count} cannot be divided among ranks: pass 0 or more.")
    return ranks
