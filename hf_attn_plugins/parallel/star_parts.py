"""The part of a Star prompt that one rank computes: its tokens, their slots, and the rectangles of slots and keys."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.parallel.method import triangle
from hf_attn_plugins.star.plan import Plan
from hf_attn_plugins.star.rectangles import rectangles_of, whole_of


class Row(NamedTuple):
    """The tokens of one batch row that a rank needs, counted from the row's first real token.

    `anchor`, `halo` and `own` do not overlap. Together they are all the keys that the rank's blocks see.

    Attributes:
        first: column of the row's first real token.
        plan: blocks, anchor and query of the row.
        own: tokens of this rank's blocks; empty if the rank has no block of this row.
        anchor: the anchor's tokens before the halo; the rank recomputes them or receives their keys from rank 0.
        halo: tokens just before `own`, whose keys the ranks before send.
        query: tokens of the query, the same on every rank.
    """

    first: int
    plan: Plan
    own: range
    anchor: range
    halo: range
    query: range


def tokens_of(plan: Plan, blocks: range) -> range:
    """The tokens of consecutive blocks; `range(0)` where there is none."""
    return range(plan.block(blocks[0]).start, plan.block(blocks[-1]).stop) if blocks else range(0)


def row_of(first: int, plan: Plan, own: range, sent: int | None) -> Row:
    """The `Row` of a rank with the blocks `own`.

    Args:
        first: column of the row's first real token.
        plan: the row's plan.
        own: tokens of the rank's blocks.
        sent: leading tokens that rank 0 can broadcast, those of its blocks; None if the rank recomputes the anchor. An
            anchor longer than that does not lie on rank 0: the halo then begins where rank 0's tokens end.
    """
    start = max(0, own.start - plan.halo_size)
    needed = min(len(plan.anchor), start)
    anchor = needed if sent is None else min(needed, sent)
    return Row(first, plan, own, range(anchor), range(start if anchor == needed else anchor, own.start), plan.query)


class Run(NamedTuple):
    """Consecutive tokens in consecutive places: slots or keys of a rank; `begin` is the place of the first token."""

    tokens: range
    begin: int

    @property
    def shift(self) -> int:
        """A token's place minus its position."""
        return self.begin - self.tokens.start


@dataclass(frozen=True, eq=False)
class Reach:
    """The keys that some of the key heads see on one rank.

    Attributes:
        halos: tokens whose keys each rank receives from the ranks before it, as [rank][batch row].
        longest_halo: tokens of the longest halo on this rank.
        rectangles: of this rank's slots over its keys (see `star_keys.keys_of`); one list for each batch row, or one
            list for all of them.
    """

    halos: list[list[range]]
    longest_halo: int
    rectangles: list[list[Rectangle]]

    @property
    def is_exchanged(self) -> bool:
        """Whether any rank receives keys; the same on every rank."""
        return any(halo for rows in self.halos for halo in rows)

    def pairs(self) -> int:
        """(query, key) pairs of the first batch row, a window left out."""
        return sum(map(causal_pairs, self.rectangles[0]))


@dataclass(frozen=True, eq=False)
class StarParts:
    """The slots of the three parts of a rank's forward: anchor | blocks | query. Each part fits its longest batch row.

    Attributes:
        ranks: the rows of every rank, as [rank][batch row].
        rank: this rank.
        anchor, own, query: slots of the three parts; `anchor` is empty if its keys are broadcast.
        kept: indices into the query's part whose keys this rank stores.
        source: the rank that broadcasts the anchor's keys; None if every rank recomputes them.
        longest_anchor: tokens of the longest `Row.anchor` of all ranks.
    """

    ranks: list[list[Row]]
    rank: int
    anchor: range
    own: range
    query: range
    kept: range
    source: int | None
    longest_anchor: int

    @property
    def rows(self) -> list[Row]:
        """The rows of this rank, one per batch row."""
        return self.ranks[self.rank]

    def slots(self, index: int) -> tuple[Run, Run, Run]:
        """The slots of the anchor's tokens, the blocks' and the query's in batch row `index`.

        The query's part is filled from its end, so that its last slot is the last token of every batch row.
        """
        row = self.rows[index]
        return (
            Run(row.anchor if self.anchor else range(0), 0),
            Run(row.own, self.own.start),
            Run(row.query, self.query.stop - len(row.query)),
        )

    @property
    def anchor_keys(self) -> int:
        """Keys of the anchor in front of all others: recomputed, or received from another rank."""
        return len(self.anchor) if self.source in (None, self.rank) else self.longest_anchor

    @functools.cached_property
    def sparse(self) -> Reach:
        """The reach of key heads that follow the plan."""
        return self._reach([[row.halo for row in rows] for rows in self.ranks], rectangles_of)

    @functools.cached_property
    def dense(self) -> Reach:
        """The reach of dense heads: all tokens between the anchor and the rank's blocks are their halo."""
        return self._reach([[range(len(row.anchor), row.own.start) for row in rows] for rows in self.ranks], whole_of)

    def _reach(self, halos: list[list[range]], of_plan: Callable[[Plan], list[Rectangle]]) -> Reach:
        longest = max(map(len, halos[self.rank]))
        lists = [
            self._rectangles(index, halo, self.anchor_keys + longest, of_plan(self.rows[index].plan))
            for index, halo in enumerate(halos[self.rank])
        ]
        return Reach(halos, longest, lists[:1] if all(found == lists[0] for found in lists) else lists)

    def key_columns(self, reach: Reach) -> Tensor:
        """(B, S) long, the column of each key of `star_keys.keys_of`; 0 where there is no key.

        Keys are in the order anchor | halo, which ends where the blocks begin | blocks | query.
        """
        before = self.anchor_keys + reach.longest_halo
        moved = before - self.own.start  # from a slot to its key
        columns = torch.zeros(len(self.rows), max(1, self.query.stop) + moved, dtype=torch.long)
        for index, (row, halo) in enumerate(zip(self.rows, reach.halos[self.rank], strict=True)):
            runs = [Run(row.anchor, 0), Run(halo, before - len(halo))]
            runs += [Run(run.tokens, run.begin + moved) for run in self.slots(index)[1:]]
            for tokens, begin in runs:
                places = torch.arange(row.first + tokens.start, row.first + tokens.stop)
                columns[index, begin : begin + len(tokens)] = places
        return columns

    def _rectangles(self, index: int, halo: range, before: int, plan: list[Rectangle]) -> list[Rectangle]:
        """The plan's rectangles of tokens as those of this rank's slots and keys; `before` keys precede its blocks'."""
        row, (anchor, own, query) = self.rows[index], self.slots(index)
        context = [Run(row.anchor, 0), Run(range(row.own.start - len(halo), row.own.stop), before - len(halo))]
        moved = before - self.own.start  # from a slot to its key
        first = query.begin - self.query.start
        kept = row.query[max(0, self.kept.start - first) : max(0, self.kept.stop - first)]
        stored = [Run(row.own, before), Run(kept, kept.start + query.shift + moved)]
        sees = ((anchor, context), (own, context), (query, stored))
        found = [
            placed(part, rows, keys)
            for part in plan
            for rows, runs in sees
            if part.row_begin < rows.tokens.stop and rows.tokens.start < part.row_end
            for keys in runs
        ]
        return [rectangle for rectangle in found if not rectangle.is_empty]


def placed(rectangle: Rectangle, rows: Run, keys: Run) -> Rectangle:
    """The part of a rectangle of tokens whose rows are in `rows` and whose keys are in `keys`, at their places.

    Keys after the last row are left out.
    """
    row = overlap(range(rectangle.row_begin, rectangle.row_end), rows.tokens)
    key = overlap(range(rectangle.key_begin, min(rectangle.key_end, row.stop)), keys.tokens)
    return Rectangle(
        row.start + rows.shift, row.stop + rows.shift, key.start + keys.shift, key.stop + keys.shift,
        position_masked=True, shift=keys.shift - rows.shift,
    )  # fmt: skip


def overlap(one: range, other: range) -> range:
    """The numbers that are in both ranges."""
    start = max(one.start, other.start)
    return range(start, max(start, min(one.stop, other.stop)))


def causal_pairs(rectangle: Rectangle) -> int:
    """Visible (row, key) pairs of a position-masked rectangle under a causal mask of offset 0."""
    keys = rectangle.key_end - rectangle.key_begin
    before = rectangle.shift - rectangle.key_begin  # row r sees the first r + 1 + before keys of the rectangle

    def seen_by_rows(end: int) -> int:
        most = max(0, end + before)
        return triangle(min(most, keys)) + keys * max(0, most - keys)

    return seen_by_rows(rectangle.row_end) - seen_by_rows(rectangle.row_begin)


def span(row: Tensor) -> tuple[int, int]:
    """(first, end) of the real tokens of a batch row; (0, 0) if it has none.

    Args:
        row: (L,) bool, False for padding.

    Raises:
        NotImplementedError: padding between real tokens.
    """
    columns = row.nonzero()[:, 0]
    if not len(columns):
        return 0, 0
    first, last = int(columns[0]), int(columns[-1])
    if last - first + 1 != len(columns):
        raise NotImplementedError(
            "star_attention on several ranks takes prompts with padding on one side or both, not between tokens: "
            "leave it out, or use tiled_attention."
        )
    return first, last + 1
