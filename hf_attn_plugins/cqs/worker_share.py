"""A worker's share as token ranges and a keep table, its recursive division, and the attention calls it comes to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hf_attn_plugins.cqs.division import Division, group_range

Range = tuple[int, int]


class Piece(NamedTuple):
    """One call of the kernel layer.

    Attributes:
        rows: range of query positions.
        keys: ascending, disjoint ranges of key positions, adjacent ones joined.
        causal: True when the keys end with the rows themselves, of which each row sees those up to its own.
    """

    rows: Range
    keys: tuple[Range, ...]
    causal: bool


@dataclass(frozen=True)
class Leaf:
    """What one worker computes: pair (i, j) of its ranges wherever `keep[i][j]`.

    Attributes:
        path: the worker's index at every level of the division; its name.
        ranges: ascending, disjoint, non-empty ranges of token positions; together the material.
        keep: symmetric table over the ranges.
    """

    path: tuple[int, ...]
    ranges: tuple[Range, ...]
    keep: tuple[tuple[bool, ...], ...]

    @property
    def name(self) -> str:
        """The path in words: "worker 3", or "worker 3.5" for worker 5 of worker 3's own division."""
        return "worker " + ".".join(map(str, self.path))

    @property
    def length(self) -> int:
        """Number of tokens in the material."""
        return sum(end - begin for begin, end in self.ranges)

    def cells(self, is_causal: bool = False) -> int:
        """Number of (query, key) pairs the worker computes."""
        sizes = [end - begin for begin, end in self.ranges]
        total = 0
        for i, n in enumerate(sizes):
            columns = range(i) if is_causal else range(len(sizes))
            total += n * sum(sizes[j] for j in columns if self.keep[i][j])
            if is_causal and self.keep[i][i]:
                total += n * (n + 1) // 2
        return total

    def pieces(self, is_causal: bool = False) -> Iterator[Piece]:
        """One piece per range of rows that has anything to compute."""
        for i, rows in enumerate(self.ranges):
            columns = range(i + 1) if is_causal else range(len(self.ranges))
            keys = joined([self.ranges[j] for j in columns if self.keep[i][j]])
            if keys:
                yield Piece(rows, keys, is_causal and self.keep[i][i])

    def rows(self, is_causal: bool = False) -> tuple[Range, ...]:
        """The ranges whose queries the pieces read."""
        last = len(self.ranges)
        return tuple(r for i, r in enumerate(self.ranges) if any(self.keep[i][: i + 1 if is_causal else last]))

    def keys(self, is_causal: bool = False) -> tuple[Range, ...]:
        """The ranges whose keys the pieces read."""
        return tuple(r for j, r in enumerate(self.ranges) if any(row[j] for row in self.keep[j if is_causal else 0 :]))

    def within(self, reach: int) -> Leaf:
        """The same leaf without pairs of ranges whose keys all lie more than `reach` positions before the rows."""
        ranges = self.ranges
        keep = (
            tuple(kept and ranges[j][1] > ranges[i][0] - reach for j, kept in enumerate(row))
            for i, row in enumerate(self.keep)
        )
        return Leaf(self.path, ranges, tuple(keep))

    def divide(self, division: Division) -> Iterator[Leaf]:
        """The leaves of the division applied to this leaf's tokens, without those that have nothing to compute.

        A pair is kept where both this leaf's table and the child's keep it, so that every pair stays with exactly one.
        Source: the recursive divide of Stream-CQSA (arXiv 2604.20819), here for any number of workers.
        """
        for worker in range(division.num_workers):
            table = division.keep(worker)
            segments = []  # (range of positions, this leaf's range, the child's group)
            for index, group in enumerate(division.groups(worker)):
                span = group_range(group, self.length, division.num_workers)
                segments += [(part, parent, index) for part, parent in self._locate(span)]
            keep = [[self.keep[p][q] and table[i][j] for _, q, j in segments] for _, p, i in segments]
            used = [i for i, row in enumerate(keep) if any(row)]
            if used:
                ranges = tuple(segments[i][0] for i in used)
                yield Leaf((*self.path, worker), ranges, tuple(tuple(keep[i][j] for j in used) for i in used))

    def _locate(self, span: Range) -> Iterator[tuple[Range, int]]:
        """The token ranges of places begin .. end in the material, each with the index of the range it lies in."""
        passed = 0
        for index, (begin, end) in enumerate(self.ranges):
            first, last = max(span[0] - passed, 0), min(span[1] - passed, end - begin)
            if first < last:
                yield (begin + first, begin + last), index
            passed += end - begin


def joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Ascending ranges with adjacent ones made one."""
    runs: list[Range] = []
    for begin, end in ranges:
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return tuple(runs)
