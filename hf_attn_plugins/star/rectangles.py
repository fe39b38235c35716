"""Star's plans as rectangles of the score matrix, which a GPU does in one launch. Integers only."""

from __future__ import annotations

from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.star.plan import Plan


def rectangles_of(plan: Plan, first: int = 0) -> list[Rectangle]:
    """The rectangles of a prompt whose first token lies at `first`: every block, the anchor's keys, the query.

    All of them are bound by causality (and a window, if the mask has one), so that together they hold every pair of
    `Plan.may_attend` once. However many blocks follow the first, their rows share one rectangle over the anchor's keys.

    Example: of `Plan(10, 4, 2, 3)`: (rows 0 .. 4, keys 0 .. 4), (4 .. 7, 4 .. 7), (4 .. 7, 0 .. 2), (7 .. 10, 0 .. 10).
    """
    if plan.is_dense:
        found = [Rectangle(0, plan.length, 0, plan.length, True)]
    else:
        found = [Rectangle(block.start, block.stop, block.start, block.stop, True) for block in plan.blocks()]
        found.append(Rectangle(plan.block_size, plan.context, 0, len(plan.anchor), True))
        found.append(Rectangle(plan.context, plan.length, 0, plan.length, True))
    moved = [
        Rectangle(a + first, b + first, c + first, d + first, position_masked)
        for a, b, c, d, position_masked, _ in found
    ]
    return [rectangle for rectangle in moved if not rectangle.is_empty]
