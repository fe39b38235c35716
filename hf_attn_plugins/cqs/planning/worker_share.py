"""A worker's share: its token ranges, the pairs of them that it keeps, its further division and its kernel calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from hf_attn_plugins.cqs.planning.division import Division, group_range

Range = tuple[int, int]


class Piece(NamedTuple):
    """One call of the kernel layer.

    Attributes:
        rows: range of query positions.
        keys: ascending, disjoint ranges of key positions; adjacent ranges are joined.
        causal: True when the last keys are the rows' own positions, and each row sees none after its own.
    """

    rows: Range
    keys: tuple[Range, ...]
    causal: bool


@dataclass(frozen=True)
class Leaf:
    """What one worker computes: the queries of range i with the keys of range j wherever `keep[i][j]`.

    Attributes:
        path: the worker's index at every level of the division, outermost first.
        ranges: ascending, disjoint, non-empty ranges of token positions; together they are the worker's material.
        keep: symmetric table over the ranges.
    """

    path: tuple[int, ...]
    ranges: tuple[Range, ...]
    keep: tuple[tuple[bool, ...], ...]

    @property
    def name(self) -> str:
        """The path as text: "worker 3", or "worker 3.5" for worker 5 of the division of worker 3."""
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
        """One piece per range of rows that keeps any keys."""
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

    def split(self, first: Callable[[Range], bool]) -> tuple[Leaf, Leaf]:
        """Two leaves: the pairs of two ranges that `first` says yes to, and all other pairs."""
        chosen = [first(span) for span in self.ranges]
        tables = [
            tuple(
                tuple(kept and (chosen[i] and chosen[j]) is wanted for j, kept in enumerate(row))
                for i, row in enumerate(self.keep)
            )
            for wanted in (True, False)
        ]
        return Leaf(self.path, self.ranges, tables[0]), Leaf(self.path, self.ranges, tables[1])

    def divide(self, division: Division) -> Iterator[Leaf]:
        """Divide this leaf's tokens among the workers of `division`; workers without any pair are left out.

        A new leaf keeps the pairs that both this leaf and the division keep, so each pair goes to exactly one new leaf.
        Source: the recursive division of Stream-CQSA (arXiv 2604.20819), here for any number of workers.
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
        """Token ranges of the material's tokens number `span[0] .. span[1]`, each with the index of its range."""
        passed = 0
        for index, (begin, end) in enumerate(self.ranges):
            first, last = max(span[0] - passed, 0), min(span[1] - passed, end - begin)
            if first < last:
                yield (begin + first, begin + last), index
            passed += end - begin


def joined(ranges: list[Range]) -> tuple[Range, ...]:
    """Ascending ranges, with ranges that touch joined. Example: (0, 2), (2, 5), (7, 8) gives (0, 5), (7, 8)."""
    runs: list[Range] = []
    for begin, end in ranges:
        if runs and runs[-1][1] == begin:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((begin, end))
    return tuple(runs)
