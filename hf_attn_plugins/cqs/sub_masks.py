"""The mask of one piece, cut from the mask over all N positions; and the check that call and plan fit together."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Predicate
from hf_attn_plugins.cqs.planning.scheduler import Plan
from hf_attn_plugins.cqs.planning.worker_share import Piece, Range


def calls(mask: Mask, piece: Piece) -> list[tuple[tuple[Range, ...], Mask]]:
    """The kernel calls of a piece: the ranges of keys of each call, and its mask.

    One call for all keys, unless the mask has a window, a prefix or a predicate. Those depend on positions: each run of
    neighbouring keys becomes a call of its own with its own offset, and runs that no row can see are left out.
    """
    if mask.window == (None, None) and not mask.prefix and mask.predicate is None:
        local = _cut(mask, piece.rows, piece.keys).replace(causal=piece.causal, offset=None)
        return [(piece.keys, local)]
    begin = piece.rows[0]
    found: list[tuple[tuple[Range, ...], Mask]] = []
    for run in piece.keys:
        if _in_reach(mask, piece.rows, run):
            local = _cut(mask, piece.rows, (run,)).replace(
                offset=begin - run[0], prefix=max(0, mask.prefix - run[0]), predicate=_shifted(mask.predicate, run[0])
            )
            found.append(((run,), local))
    return found


def _in_reach(mask: Mask, rows: Range, run: Range) -> bool:
    if run[0] < mask.prefix:
        return True
    left, right = mask.window
    near = (left is None or run[1] > rows[0] - left) and (right is None or run[0] < rows[1] + right)
    return near and not (mask.causal and run[0] >= rows[1])


def _cut(mask: Mask, rows: Range, runs: tuple[Range, ...]) -> Mask:
    def keys_of(tensor: Tensor | None, dim: int = 1) -> Tensor | None:
        if tensor is None or tensor.ndim == 0 or tensor.shape[dim] == 1:
            return tensor
        parts = [tensor.narrow(dim, begin, end - begin) for begin, end in runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    bias, segments = keys_of(mask.bias, -1), mask.query_segments
    if bias is not None and bias.ndim >= 2 and bias.shape[-2] > 1:
        bias = bias.narrow(-2, rows[0], rows[1] - rows[0])
    return mask.replace(
        key_padding=keys_of(mask.key_padding),
        key_segments=keys_of(mask.key_segments),
        query_segments=None if segments is None else segments[:, slice(*rows)],
        bias=bias,
        drops=None if mask.drops is None else mask.drops.at(slice(*rows), runs),
    )


def _shifted(predicate: Predicate | None, first_key: int) -> Predicate | None:
    if predicate is None or first_key == 0:
        return predicate
    whole: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = predicate
    return lambda b, h, q, k: whole(b, h, q + first_key, k + first_key)


def check_lengths(rows: int, keys: int, plan: Plan, mask: Mask) -> None:
    """Check that this is self-attention over the plan's tokens.

    Raises:
        ValueError: the number of rows or keys is not the plan's, or row 0 is not at position 0.
    """
    if not rows == keys == plan.num_tokens:
        raise ValueError(
            f"the plan is for {plan.num_tokens} tokens, got {rows} query and {keys} key positions: CQS divides square "
            "self-attention; use kernels.attend for decoding and cross-attention."
        )
    if mask.start(rows, keys) != 0:
        raise ValueError(f"mask.offset={mask.offset}: self-attention starts at position 0; pass offset=0 or None.")
