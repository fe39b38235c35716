"""Partial results of attention and their exact merge: the arithmetic every method of this package stands on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Partial(NamedTuple):
    """Attention over some of a row's keys.

    Attributes:
        out: (B, H, T, Dv), any float dtype: the softmax-weighted mean of the values seen; 0 where no key was seen.
        lse: (B, H, T), float32 (float64 for float64 input), natural log of the sum of exp(scores); -inf where no key
            was seen.
    """

    out: Tensor
    lse: Tensor

    @classmethod
    def empty(cls, query: Tensor, head_dim_v: int) -> Partial:
        """The neutral element of `merge` for rows of `query` (B, H, T, D): out 0, lse -inf."""
        out = query.new_zeros(*query.shape[:-1], head_dim_v)
        return cls(out, query.new_full(query.shape[:-1], -torch.inf, dtype=lse_dtype(query)))

    @classmethod
    def unfilled(cls, query: Tensor, head_dim_v: int) -> Partial:
        """Memory for the result of rows of `query` (B, H, T, D); out runs token by token, as models read it next."""
        batch, heads, rows, _ = query.shape
        strides = (rows * heads * head_dim_v, head_dim_v, heads * head_dim_v, 1)
        out = query.new_empty_strided((batch, heads, rows, head_dim_v), strides)
        # `new_empty` takes longer: less code of PyTorch runs where the function is the same.
        lse = query.new_empty_strided((batch, heads, rows), (heads * rows, rows, 1), dtype=lse_dtype(query.dtype))
        return cls(out, lse)

    def rows(self, low: int, high: int) -> Partial:
        """Rows low..high, as views."""
        return Partial(self.out[:, :, low:high], self.lse[:, :, low:high])

    @classmethod
    def cat(cls, parts: Sequence[Partial], dim: int = 2) -> Partial:
        """Partials of consecutive rows as one; dim 0 joins rows of the batch instead."""
        if len(parts) == 1:
            return parts[0]
        return cls(torch.cat([part.out for part in parts], dim), torch.cat([part.lse for part in parts], dim))


def lse_dtype(like: Tensor | torch.dtype) -> torch.dtype:
    """float64 for float64 (a tensor's or the dtype itself), else float32."""
    dtype = like.dtype if isinstance(like, Tensor) else like
    return torch.float64 if dtype == torch.float64 else torch.float32


def with_sinks(partial: Partial, sinks: Tensor | None) -> Partial:
    """Add learned sinks to the softmax's denominator: out * sigmoid(lse - sink), lse = log(exp lse + exp sink).

    A sink counts once per row: call this after the last merge. None changes nothing. Source: GPT-OSS.

    Args:
        sinks: logits (Hq,), one per head, or of three dimensions that broadcast to lse (B, Hq, T).
    """
    if sinks is None:
        return partial
    logits = sinks.to(partial.lse.dtype)
    if logits.ndim == 1:
        logits = logits.view(1, -1, 1)
    share = torch.sigmoid(partial.lse - logits).unsqueeze(-1)
    return Partial((partial.out * share).to(partial.out.dtype), torch.logaddexp(partial.lse, logits))


def merge(partials: Iterable[Partial]) -> Partial:
    """Merge partial results over disjoint sets of keys into the result over their union, in any order.

    With M = max_i lse_i and w_i = exp(lse_i - M): out = sum w_i out_i / sum w_i and lse = M + log sum w_i (the lse
    combination of FlashAttention, arXiv 2205.14135, section 3.1, in the form that cannot overflow). Partials without
    keys change nothing; rows where every partial is empty give out 0 and lse -inf. Differentiable in every out and lse.

    Args:
        partials: at least one `Partial`, all of the same shapes; out of any float dtype (merged in float32, or float64
            if any partial is), lse float32 or float64.

    Returns:
        The merged `Partial`; out in the dtype of the first partial.

    Raises:
        ValueError: no partial was given, or their shapes differ.
    """
    parts = list(partials)
    if not parts:
        raise ValueError("merge() got no partials: pass at least one Partial (Partial.empty(...) is the neutral one).")
    shapes = {(tuple(part.out.shape), tuple(part.lse.shape)) for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"merge() needs partials of one shape, got (out, lse) shapes {sorted(shapes)}.")
    if len(parts) == 1:
        return parts[0]
    acc_dtype = torch.float64 if any(part.lse.dtype == torch.float64 for part in parts) else torch.float32
    lses = torch.stack([part.lse.to(acc_dtype) for part in parts])
    # The maximum is a constant shift: its gradient cancels exactly, so it is kept out of the graph, and clamped so that
    # rows without keys give exp(-inf) = 0 instead of exp(-inf + inf) = NaN.
    shift = lses.detach().amax(0).clamp_min(torch.finfo(acc_dtype).min)
    weights = (lses - shift).exp()
    total = weights.sum(0)
    seen = total > 0
    share = weights / torch.where(seen, total, 1).unsqueeze(0)
    # Summed one by one rather than stacked: `out` is the large tensor here.
    out = sum(w.unsqueeze(-1) * part.out.to(acc_dtype) for w, part in zip(share.unbind(0), parts, strict=True))
    lse = torch.where(seen, shift + torch.where(seen, total, 1).log(), -torch.inf)
    return Partial(out.to(parts[0].out.dtype), lse)  # type: ignore[union-attr]
