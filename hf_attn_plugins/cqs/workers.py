"""The Workers: each computes the attention of its own pairs of tokens, from its own tokens alone."""

from __future__ import annotations

from typing import NamedTuple

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.cqs.planning.worker_share import Leaf, Range
from hf_attn_plugins.cqs.sub_masks import calls
from hf_attn_plugins.cqs.tokens import Tokens
from hf_attn_plugins.kernels.attend import attend


class WorkerResult(NamedTuple):
    """What a worker reports.

    Attributes:
        path: the leaf's path: which worker this is.
        rows: ranges of query positions.
        partials: for each range, the attention of its rows over the keys that the worker keeps for them.
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
    """Compute one leaf. It needs nothing from other workers, so it can run anywhere, in any order, and again.

    Each range of rows is one kernel call over all keys kept for these rows; `sub_masks.calls` names the exceptions.

    Args:
        leaf: one of `Plan.leaves()`.
        query, key, value: hold at least the leaf's ranges of (B, Hq, N, D), (B, Hkv, N, D) and (B, Hkv, N, Dv). Causal
            attention needs less: `leaf.rows(True)` of the query, `leaf.keys(True)` of key and value.
        mask: over all N x N positions, its offset 0 or None; None sees everything.
        scale, softcap, dropout, kernel: as in `kernels.attend`.
        only: one of the leaf's ranges: only the rows of this range are computed.

    Raises:
        ValueError: query, key or value lack tokens of the leaf, or an argument does not fit; see `kernels.attend`.
    """
    mask = Mask() if mask is None else mask
    # Rows before and inside of a prefix see all of it, so pairs above the diagonal are needed, too.
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
