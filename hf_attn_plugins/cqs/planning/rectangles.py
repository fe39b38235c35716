"""The shares of workers as rectangles of the score matrix, for kernels that compute many in one launch; integers."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Iterable

from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.cqs.planning.scheduler import Plan
from hf_attn_plugins.cqs.planning.worker_share import Leaf, Range, joined


def rectangles_of(leaves: Iterable[Leaf], is_causal: bool = False) -> list[Rectangle]:
    """Rectangles that cover the cells kept by `leaves`, each cell once; `leaves` may be any workers of a plan.

    Rows are cut wherever a worker's range begins or ends. All keys that the workers keep for the same rows are joined
    into runs. The leaves of a whole plan give one run per group of tokens, so a kernel visits no tile twice. Causal
    rectangles on the diagonal hold cells above it, which the mask hides.

    Example: the leaves of `plan(8, 2)`, causal: rows 0 .. 4 see keys 0 .. 4, rows 4 .. 8 see keys 0 .. 8.
    """
    kept: dict[Range, list[Range]] = defaultdict(list)
    for leaf in leaves:
        for piece in leaf.pieces(is_causal):
            kept[piece.rows] += piece.keys
    cuts = sorted({end for rows in kept for end in rows})
    place = {position: index for index, position in enumerate(cuts)}
    keys: list[list[Range]] = [[] for _ in cuts[1:]]
    for (begin, end), runs in kept.items():
        for index in range(place[begin], place[end]):
            keys[index] += runs
    return [
        Rectangle(begin, end, *run, True)
        for (begin, end), runs in zip(itertools.pairwise(cuts), keys, strict=True)
        for run in joined(sorted(runs))
    ]


@functools.lru_cache(maxsize=32)  # every layer of a model has the same plan
def of_plan(plan: Plan, is_causal: bool) -> list[Rectangle]:
    """`rectangles_of` all leaves of a plan."""
    return rectangles_of(plan.leaves(), is_causal)
