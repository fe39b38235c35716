"""Attention over a list of (rows, keys) rectangles: the only place that decides between one launch and many calls.

A planner (Star's blocks and anchor, CQS's pairs of token groups) lists the rectangles that it needs.
The Triton kernels and the compiled CPU kernels take the list in one launch: each tile of rows loops over the rectangles
that touch the tile. FlexAttention takes it as a list of tiles. With other kernels `attend` computes each rectangle and
`merge` combines the results.
"""

from __future__ import annotations

import itertools
from typing import Any

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.core.rectangle import Rectangle, Rectangles, check_rectangles, per_batch
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.choose import after_failed_flex, choose_rectangles
from hf_attn_plugins.kernels.flex.attend import Failed


def attend_rectangles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Rectangles,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
) -> Partial:
    """Attention over the rectangles of a plan, merged; differentiable like `kernels.attend`.

    Args:
        query, key, value: as in `kernels.attend`.
        plan: `Rectangle`s for all rows of the batch, or one list of them per row of the batch.
        mask: what else restricts the pairs. Its `causal` and `window` (about positions `t + offset`) bind
            `position_masked` rectangles only; everything else binds all rectangles.
        scale, softcap, dropout: as in `kernels.attend`.
        kernel: one of `KERNELS`; None chooses. "flex", "triton" and "cpu_fused" launch once, others once per rectangle.

    Raises:
        ValueError: a rectangle outside the score matrix, or a plan of another batch size.
        NotImplementedError: the named kernel cannot do what was asked.
    """
    mask = (mask or Mask()).dropping(dropout, query, key)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    lists = per_batch(plan)
    check_rectangles(lists, query.shape[0], query.shape[2], key.shape[2])
    call = (query, key, value, mask, softcap, dropout)
    one_launch = choose_rectangles(*call, kernel, lists)
    if one_launch is not None:
        try:
            return one_launch(query, key, value, mask, scale, softcap, dropout, lists)
        except Failed as error:
            if kernel is not None:
                raise
            after_failed_flex(error, *call)
            return attend_rectangles(query, key, value, plan, mask=mask, scale=scale, softcap=softcap, dropout=dropout)
    options = {"scale": scale, "softcap": softcap, "dropout": dropout, "kernel": kernel}
    start = mask.start(query.shape[2], key.shape[2])
    if len(lists) == 1:
        return _one_by_one(query, key, value, mask, start, lists[0], options)
    parts = []
    for b in range(query.shape[0]):
        item, row = slice(b, b + 1), mask.slice_batch(b)
        parts.append(_one_by_one(query[item], key[item], value[item], row, start, lists[b], options))
    return Partial.cat(parts, dim=0) if parts else Partial.empty(query, value.shape[-1])


def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, start: int, plan: list[Rectangle], options: dict[str, Any]
) -> Partial:
    """Batch rows of one plan: a call per rectangle, merged between every two rows where a rectangle begins or ends."""
    rectangles = [rectangle for rectangle in plan if not rectangle.is_empty]
    parts = [_one(query, key, value, mask, start, rectangle, options) for rectangle in rectangles]
    nothing = Partial.empty(query, value.shape[-1])
    cuts = sorted({0, query.shape[2], *(edge for rectangle in rectangles for edge in rectangle[:2])})
    bands = []
    for low, high in itertools.pairwise(cuts):
        inside = [
            part.rows(low - rectangle.row_begin, high - rectangle.row_begin)
            for rectangle, part in zip(rectangles, parts, strict=True)
            if rectangle.row_begin <= low and high <= rectangle.row_end
        ]
        bands.append(merge(inside or [nothing.rows(low, high)]))
    return Partial.cat(bands) if bands else nothing


def _one(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, start: int, rectangle: Rectangle, options: dict[str, Any]
) -> Partial:
    if not rectangle.position_masked:
        mask = mask.replace(causal=False, window=(None, None))
    rows, keys = slice(rectangle.row_begin, rectangle.row_end), slice(rectangle.key_begin, rectangle.key_end)
    sub = sub_mask(mask, rows, keys, start + (rectangle.shift if rectangle.position_masked else 0))
    return attend(query[:, :, rows], key[:, :, keys], value[:, :, keys], mask=sub, **options)


def sub_mask(mask: Mask, rows: slice, keys: slice, start: int) -> Mask:
    """The mask of a rectangle of the score matrix."""
    segments = mask.query_segments
    bias = mask.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., rows, :]
    part = mask.replace(
        query_segments=None if segments is None else segments[:, rows],
        bias=bias,
        drops=None if mask.drops is None else mask.drops.cut(rows),
        offset=start + rows.start,
    )
    part = part.over_keys(keys)
    return part.replace(offset=start + rows.start - keys.start, prefix=max(0, mask.prefix - keys.start))
