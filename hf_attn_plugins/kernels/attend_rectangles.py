"""Plans of many pieces in few launches: block-sparse attention as a list of (rows, keys) rectangles.

A planner (Star's blocks and anchor, CQS's pairs of token groups) lists the rectangles of the score matrix it wants; the
Triton kernels then walk, for every tile of rows, the key ranges of the pieces that touch it, in a single launch.
Without Triton the same list is done piece by piece with `attend` and merged: the same numbers, more calls.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.core.rectangle import Piece, Plan, check_plan, per_batch
from hf_attn_plugins.kernels.choose import load


def attend_rectangles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: Plan,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
) -> Partial:
    """Attention over the pieces of a plan, merged; differentiable like `kernels.attend`.

    Args:
        query, key, value: as in `kernels.attend`.
        plan: `Piece`s for all rows of the batch, or a list of them for each row.
        mask: what else restricts the pairs; its `causal` and `window` (about positions `t + offset`) bind banded
            pieces only, everything else binds all of them.
        scale, softcap, dropout: as in `kernels.attend`.
        kernel: "triton" for a single launch; None takes it on GPUs, and pieces one by one elsewhere.

    Raises:
        ValueError: pieces outside the score matrix, or a plan of another batch size.
    """
    from hf_attn_plugins.kernels.attend import attend

    mask = mask or Mask()
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    lists = per_batch(plan)
    num_rows, num_keys = query.shape[2], key.shape[2]
    check_plan(lists, query.shape[0], num_rows, num_keys)
    if kernel == "triton" or (kernel is None and query.device.type == "cuda"):
        from hf_attn_plugins.kernels.triton.attend import supported

        reason = supported(query, key, value, mask, softcap, dropout)
        if reason is None:
            load("triton")  # its module, with a clear error where Triton is missing
            from hf_attn_plugins.kernels.triton.attend import run

            return run(query, key, value, mask, scale, softcap, dropout, lists)
        if kernel == "triton":
            raise NotImplementedError(f"kernel 'triton' cannot do {reason}: use kernel=None.")
    start = mask.start(num_rows, num_keys)

    def one(b: int, piece: Piece) -> Partial:
        row = mask.slice_batch(b)
        if not piece.banded:
            row = row.replace(causal=False, window=(None, None))
        rows, keys = slice(piece.row_begin, piece.row_end), slice(piece.key_begin, piece.key_end)
        sub = sub_mask(row, rows, keys, start + (piece.shift if piece.banded else 0))
        item = slice(b, b + 1)
        return attend(
            query[item, :, rows], key[item, :, keys], value[item, :, keys],
            mask=sub, scale=scale, softcap=softcap, dropout=dropout, kernel=kernel,
        )  # fmt: skip

    outs, lses = [], []
    for b in range(query.shape[0]):
        part = Partial.empty(query[b : b + 1], value.shape[-1])
        pieces = [piece for piece in lists[b % len(lists)] if not piece.is_empty]
        cuts = sorted({0, num_rows, *(edge for piece in pieces for edge in piece[:2])})
        done = [one(b, piece) for piece in pieces]
        bands = []
        for low, high in itertools.pairwise(cuts):
            inside = [
                _rows(whole, low - piece.row_begin, high - piece.row_begin)
                for piece, whole in zip(pieces, done, strict=True)
                if piece.row_begin <= low and high <= piece.row_end
            ]
            bands.append(merge([_rows(part, low, high), *inside]))
        outs.append(torch.cat([band.out for band in bands], 2) if bands else part.out)
        lses.append(torch.cat([band.lse for band in bands], 2) if bands else part.lse)
    return Partial(torch.cat(outs), torch.cat(lses))


def _rows(part: Partial, low: int, high: int) -> Partial:
    return Partial(part.out[:, :, low:high], part.lse[:, :, low:high])


def sub_mask(mask: Mask, rows: slice, keys: slice, start: int) -> Mask:
    """The mask of a rectangle of the score matrix."""
    segments = mask.query_segments
    bias = mask.bias
    if bias is not None and bias.shape[-2] > 1:
        bias = bias[..., rows, :]
    part = mask.replace(
        query_segments=None if segments is None else segments[:, rows], bias=bias, offset=start + rows.start
    )
    part = part.over_keys(keys)
    return part.replace(offset=start + rows.start - keys.start, prefix=max(0, mask.prefix - keys.start))
