"""Star's plans as rectangles of the score matrix, which some kernels do in one launch. Integers only."""

from __future__ import annotations

import functools

from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.star.plan import Plan


def rectangles_of(plan: Plan, first: int = 0) -> list[Rectangle]:
    """The rectangles of a prompt whose first token lies at `first`: blocks with their halo, the anchor, the query.

    All of them are bound by causality (and a window, if the mask has one), so that together they hold every pair of
    `Plan.may_attend` once. The first blocks, which see everything before them, are one rectangle. However many blocks
    follow, their rows share one rectangle over the anchor's keys.

    Example: of `Plan(10, 4, 2, 3)`: (rows 0 .. 4, keys 0 .. 4), (4 .. 7, 4 .. 7), (4 .. 7, 0 .. 2), (7 .. 10, 0 .. 10).
    """
    return list(_rectangles(plan, first))


@functools.lru_cache(maxsize=64)  # every layer of a model asks for the same plans
def _rectangles(plan: Plan, first: int) -> tuple[Rectangle, ...]:
    if plan.is_dense:
        found = [(0, plan.length, 0, plan.length)]
    else:
        end, context = plan.dense_end, plan.context
        later = range(end // plan.block_size, plan.num_blocks)
        found = [(0, end, 0, end)]
        found += [(*_edges(plan.block(index)), *_edges(plan.near(index))) for index in later]
        found += [(end, context, 0, len(plan.anchor)), (context, plan.length, 0, plan.length)]
    moved = (Rectangle(a + first, b + first, c + first, d + first, True) for a, b, c, d in found)
    return tuple(rectangle for rectangle in moved if not rectangle.is_empty)


def whole_of(plan: Plan, first: int = 0) -> list[Rectangle]:
    """The one rectangle of a prompt whose tokens see everything before them."""
    return [Rectangle(first, first + plan.length, first, first + plan.length, True)] if plan.length else []


def _edges(tokens: range) -> tuple[int, int]:
    return tokens.start, tokens.stop
