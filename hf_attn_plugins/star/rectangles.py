"""Star's plans as rectangles of the score matrix, which a GPU does in one launch. Integers only."""

from __future__ import annotations

from hf_attn_plugins.core.rectangle import Piece
from hf_attn_plugins.star.plan import Plan


def pieces(plan: Plan, first: int = 0) -> list[Piece]:
    """The rectangles of a prompt whose first token lies at `first`: every block, the anchor's keys, the query.

    All of them are bound by causality (and a window, if the mask has one), so that together they hold every pair of
    `Plan.may_attend` once. However many blocks follow the first, their rows share one rectangle over the anchor's keys.

    Example: of `Plan(10, 4, 2, 3)`: (rows 0 .. 4, keys 0 .. 4), (4 .. 7, 4 .. 7), (4 .. 7, 0 .. 2), (7 .. 10, 0 .. 10).
    """
    if plan.is_dense:
        found = [Piece(0, plan.length, 0, plan.length, True)]
    else:
        found = [Piece(block.start, block.stop, block.start, block.stop, True) for block in plan.blocks()]
        found.append(Piece(plan.block_size, plan.context, 0, len(plan.anchor), True))
        found.append(Piece(plan.context, plan.length, 0, plan.length, True))
    moved = [Piece(a + first, b + first, c + first, d + first, banded) for a, b, c, d, banded, _ in found]
    return [piece for piece in moved if not piece.is_empty]
