"""Packed sequences whose queries and keys differ in length: a rectangle of the score matrix each, in one launch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window, window_of
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles

Offsets = Tensor | Sequence[int]


def attend_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Offsets,
    cu_seqlens_k: Offsets | None = None,
    *,
    is_causal: bool = False,
    window: int | Window | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
) -> Partial:
    """Attention within packed sequences, row to its own sequence's keys; differentiable like `kernels.attend`.

    Args:
        query: (1, Hq, T, D), the sequences one after another; key, value: (1, Hkv, S, D) and (1, Hkv, S, Dv).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) whole numbers, where each begins and the last ends, as in
            flash-attention; keys lie as queries do when None. Tensors on a GPU are waited for, lists are not. What
            lies behind the last sequence is seen by none and gives out 0, lse -inf.
        is_causal, window: aligned to the bottom right of each sequence: its last row stands at its last key.
        scale, softcap, dropout, kernel: as in `kernels.attend`.

    Raises:
        ValueError: offsets that do not begin at 0, decrease, end behind the tensors, or differ in number.
    """
    rows = _offsets("cu_seqlens_q", cu_seqlens_q, query)
    keys = rows if cu_seqlens_k is None else _offsets("cu_seqlens_k", cu_seqlens_k, key)
    if len(rows) != len(keys):
        counts = f"{len(rows) - 1} and {len(keys) - 1} sequences"
        raise ValueError(f"cu_seqlens_q and cu_seqlens_k have {counts}: give both the same number.")
    if rows[-1] > query.shape[2] or keys[-1] > key.shape[2]:
        raise ValueError(
            f"sequences end at row {rows[-1]} and key {keys[-1]}, of {query.shape[2]} rows and {key.shape[2]} keys."
        )
    return attend_rectangles(
        query, key, value, rectangles_of(rows, keys), mask=Mask(causal=is_causal, window=window_of(window), offset=0),
        scale=scale, softcap=softcap, dropout=dropout, kernel=kernel,
    )  # fmt: skip


def rectangles_of(rows: Sequence[int], keys: Sequence[int]) -> list[Rectangle]:
    """The rectangle of every sequence, shifted so that its last row stands at its last key.

    Example: of rows (0, 2, 5) and keys (0, 4, 5): rows 0 .. 2 see keys 0 .. 4 and stand at 2 and 3; rows 2 .. 5 see
    key 4 and stand at 2, 3 and 4.
    """
    found = [Rectangle(*t, *s, True, s[1] - t[1]) for t, s in zip(pairwise(rows), pairwise(keys), strict=True)]
    return [piece for piece in found if not piece.is_empty]


def _offsets(name: str, given: Offsets, tensor: Tensor) -> list[int]:
    if tensor.ndim != 4 or tensor.shape[0] != 1:
        raise ValueError(
            f"packed sequences lie in one row of a batch, (1, heads, tokens, head_dim): got {tuple(tensor.shape)}."
        )
    numbers = [int(n) for n in (given.tolist() if isinstance(given, Tensor) else given)]
    if not numbers or numbers[0] != 0 or any(a > b for a, b in pairwise(numbers)):
        raise ValueError(f"{name}={numbers}: offsets begin at 0 and do not decrease.")
    return numbers
