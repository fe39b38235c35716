"""A list of rectangles as bands of rows that see the same keys: integers only, from which `plan.py` makes tables."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from hf_attn_plugins.core.rectangle import Rectangle

HIDDEN = -(2**31)  # what a row sees of a key: nothing,
WHOLE = HIDDEN + 1  # or the key, wherever both stand; any larger number is the shift of a rectangle bound by positions
MOST_ENTRIES = 1 << 24  # of one list's table; 64 MiB


class Run(NamedTuple):
    """Keys key_begin .. key_end, which the rows of one band see as `entry` says: `WHOLE` or a shift."""

    key_begin: int
    key_end: int
    entry: int


class Bands(NamedTuple):
    """Rows cuts[i] .. cuts[i + 1] see the keys of runs[i], which are sorted and apart."""

    cuts: tuple[int, ...]
    runs: tuple[tuple[Run, ...], ...]

    @property
    def key_cuts(self) -> list[int]:
        """Where a run begins or ends, and key 0."""
        return sorted({0, *(edge for runs in self.runs for run in runs for edge in run[:2])})


def bands_of(plan: Sequence[Rectangle], num_rows: int) -> Bands:
    """The bands of the rectangles of one list; runs that touch and are alike become one.

    Example: rows 0 .. 2 see keys 0 .. 4, rows 1 .. 3 see keys 4 .. 5: the cuts are 0, 1, 2, 3, and the runs of the
    three bands 0 .. 4, 0 .. 5 and 4 .. 5.

    Raises:
        NotImplementedError: two rectangles share rows and keys, or the table would have more than `MOST_ENTRIES`.
    """
    rectangles = [each for each in plan if not each.is_empty]
    cuts = sorted({0, num_rows, *(edge for each in rectangles for edge in each[:2])})
    edges = {edge for each in rectangles for edge in each[2:4]}
    if len(cuts) * len(edges) > MOST_ENTRIES:
        raise NotImplementedError(
            f"a plan whose rows are cut into {len(cuts) - 1} parts and keys at {len(edges)} places (more than "
            f"{MOST_ENTRIES} pairs of them)"
        )
    place = {cut: index for index, cut in enumerate(cuts)}
    found: list[list[Run]] = [[] for _ in cuts[1:]]
    for each in rectangles:
        run = Run(each.key_begin, each.key_end, each.shift if each.position_masked else WHOLE)
        for index in range(place[each.row_begin], place[each.row_end]):
            found[index].append(run)
    return Bands(tuple(cuts), tuple(map(_joined, found)))


def _joined(runs: list[Run]) -> tuple[Run, ...]:
    runs.sort()
    for one, other in itertools.pairwise(runs):
        if other.key_begin < one.key_end:
            end = min(one.key_end, other.key_end)
            raise NotImplementedError(f"rectangles that share pairs (keys {other.key_begin} .. {end} of the same rows)")
    joined = runs[:1]
    for run in runs[1:]:
        last = joined[-1]
        if run.key_begin == last.key_end and run.entry == last.entry:
            joined[-1] = last._replace(key_end=run.key_end)
        else:
            joined.append(run)
    return tuple(joined)
