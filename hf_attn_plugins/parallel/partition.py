"""Who gets what: tokens, blocks and generated keys dealt to ranks. Integers only."""

from __future__ import annotations

import itertools
from collections.abc import Sequence


def contiguous(count: int, ranks: int) -> list[range]:
    """`count` things in order, dealt in runs whose lengths differ by at most one, the longer ones first.

    Example: `contiguous(7, 3)` is [range(0, 3), range(3, 5), range(5, 7)].

    Raises:
        ValueError: fewer than one rank, or a negative count.
    """
    _check(count, ranks)
    least, more = divmod(count, ranks)
    starts = [rank * least + min(rank, more) for rank in range(ranks + 1)]
    return [range(first, end) for first, end in itertools.pairwise(starts)]


def blocks(context: int, block_size: int, ranks: int) -> list[range]:
    """The blocks of a context dealt in runs, the longest run in tokens as short as runs of even counts allow.

    The last block may be ragged, so a run more at the end can be better than one at the start. The first rank always
    has the first block.

    Example: 5 blocks of 8 tokens, the last of 2, on 2 ranks: `blocks(34, 8, 2)` is [range(0, 2), range(2, 5)].
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
    """`count` tokens in order, dealt so that causal attention costs every rank about the same.

    The tokens are cut into 2 x ranks runs; rank r gets runs r and 2 x ranks - 1 - r: what a late run costs more than
    the middle, its early partner costs less. Neighbouring runs of a rank are joined, empty ones left out.

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
    """`count` new tokens dealt in runs, in the order of the ranks, so that the largest load is as small as can be.

    The least loaded ranks are filled up first; ties go to the first of them. Tokens that come one by one therefore go
    round the ranks once their loads are level.

    Args:
        loads: tokens that each rank holds already.

    Example: `level([5, 3, 3], 3)` is [range(0, 0), range(0, 2), range(2, 3)].
    """
    ranks = len(loads)
    _check(count, ranks)
    order = sorted(range(ranks), key=lambda rank: (loads[rank], rank))
    # The water line: the k least loaded ranks are filled to one height, and the next one stands higher than that.
    share = [0] * ranks
    for filled in range(1, ranks + 1):
        chosen = order[:filled]
        height, more = divmod(sum(loads[rank] for rank in chosen) + count, filled)
        if filled == ranks or height < loads[order[filled]] or (height == loads[order[filled]] and not more):
            for place, rank in enumerate(chosen):
                share[rank] = height + (place < more) - loads[rank]
            break
    starts = [sum(share[:rank]) for rank in range(ranks + 1)]
    return [range(first, end) for first, end in itertools.pairwise(starts)]


def _check(count: int, ranks: int) -> int:
    if ranks < 1:
        raise ValueError(f"{ranks} ranks: at least 1 process is needed.")
    if count < 0:
        raise ValueError(f"{count} things cannot be dealt: a count of 0 or more is needed.")
    return ranks
