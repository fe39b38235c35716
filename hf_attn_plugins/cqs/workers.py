"""The Workers: one leaf's pairs, computed from its own material, as partial results."""

from __future__ import annotations

from typing import NamedTuple

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.cqs.sub_masks import calls
from hf_attn_plugins.cqs.tokens import Tokens
from hf_attn_plugins.cqs.worker_share import Leaf, Range
from hf_attn_plugins.kernels.attend import attend


class WorkerResult(NamedTuple):
    """What a worker reports.

    Attributes:
        path: the leaf's path, which says whose result this is.
        rows, partials: ranges of query positions, and the attention of these rows over the keys the worker kept.
    """

    path: tuple[int, ...]
    rows: tuple[Range, ...]
    partials: tuple[Partial, ...]


def work(
    leaf: Leaf,
    query: Tokens,
    key: Tokens,
    value: Tokens,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
    only: Range | None = None,
) -> WorkerResult:
    """Compute one leaf. Needs nothing from other workers; may be run anywhere, again, and in any order.

    Blocks that the leaf does not keep are never computed. One kernel call per range of rows, over all keys kept for it.

    Args:
        leaf: one of `Plan.leaves()`.
        query, key, value: hold at least the leaf's ranges of (B, Hq, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv); for
            causal attention `leaf.rows(True)` of the query and `leaf.keys(True)` of key and value are enough.
        mask: over all N x N positions, its offset 0 or None.
        scale, softcap, dropout, kernel: as in `kernels.attend`.
        only: one of the leaf's ranges, to compute the rows of this range alone.
    """
    mask = Mask() if mask is None else mask
    # A prefix is seen from before it, so that its blocks above the diagonal count although the rest is causal.
    is_causal = mask.causal and not mask.prefix
    key, value = (x.gather(leaf.keys(is_causal)) for x in (key, value))
    rows, partials = [], []
    for piece in leaf.pieces(is_causal):
        if only not in (None, piece.rows):
            continue
        queries = query.take((piece.rows,))
        found = [
            attend(
                queries,
                key.take(keys),
                value.take(keys),
                mask=local,
                scale=scale,
                softcap=softcap,
                dropout=dropout,
                kernel=kernel,
            )
            for keys, local in calls(mask, piece)
        ]
        if found:
            rows.append(piece.rows)
            partials.append(merge(found))
    return WorkerResult(leaf.path, tuple(rows), tuple(partials))
