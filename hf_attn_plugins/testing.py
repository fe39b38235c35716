"""Oracles and the error rule: what the tests, the evaluation and users compare with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def allowed_error(low: Tensor, ref: Tensor, factor: float = 2.0) -> float:
    """The largest error that counts as right: `factor` times that of plain low precision, plus one rounding.

    Args:
        low: the same mathematics done the plain way in the dtype under test.
        ref: float64 (or float32) reference of the same shape.
        factor: 2, or 3 for gradients and softcap.

    Source: the tolerance of flash-attention's tests, with the rounding term measured in the dtype under test.
    """
    rounded = ref.to(low.dtype)
    rounding = ((rounded + 0.3 - 0.3) - rounded).abs().max().item() if ref.numel() else 0.0
    plain = (low.to(ref.dtype) - ref).abs().max().item() if ref.numel() else 0.0
    floor = 1e-10 if low.dtype == torch.float64 else 0.0  # float64 against float64: plain error says nothing
    return max(factor * plain + 2.0 * rounding, floor)


def closeness(out: Tensor, low: Tensor, ref: Tensor, factor: float = 2.0) -> str | None:
    """What breaks the error rule max|out - ref| <= `allowed_error(low, ref, factor)`, or None where it holds.

    Code that runs for users raises its own error with this text; unlike an assert, it also holds under `python -O`.

    Args:
        out: the result under test; low, ref, factor: as in `allowed_error`, all three of one shape.

    Returns:
        the shapes that differ, a limit that is not finite (NaN or inf in `low` or `ref`, which nothing may be measured
        by), or both errors and the place of the worst element; a NaN in `out` counts as an infinite error.
    """
    for name, given in (("the result", out), ("the plain low-precision result", low)):
        if given.shape != ref.shape:
            return f"{name} has shape {tuple(given.shape)}, the reference {tuple(ref.shape)}"
    if not ref.numel():
        return None
    limit = allowed_error(low, ref, factor)
    if not math.isfinite(limit):
        return f"the allowed error is {limit}: the reference or the plain low-precision result is not finite"
    error = (out.to(ref.dtype) - ref).abs().nan_to_num(torch.inf, torch.inf)
    worst = int(error.argmax())
    where = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    if not bool((error <= limit).all()):
        return f"error {error.flatten()[worst]:.3e} > {limit:.3e} at {where}"
    return None


def assert_close_to_reference(out: Tensor, low: Tensor, ref: Tensor, factor: float = 2.0, name: str = "out") -> None:
    """For tests: raise AssertionError with what `closeness` finds wrong."""
    wrong = closeness(out, low, ref, factor)
    if wrong is not None:
        raise AssertionError(f"{name}: {wrong}")


def dense_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention straight from the definition, with a visibility matrix written out: the independent oracle.

    Args:
        query, key, value: as in `kernels.attend`.
        visible: bool, broadcastable to (B, Hq, T, S).

    Returns:
        out (B, Hq, T, Dv), zero where a row sees nothing, and lse (B, Hq, T), -inf there.
    """
    if key.shape[2] == 0:
        lse = query.new_full(query.shape[:-1], -torch.inf)
        return query.new_zeros(*query.shape[:-1], value.shape[-1]), lse
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([x] * groups, 2).flatten(1, 2) for x in (key, value))
    scores = torch.einsum("bhtd,bhsd->bhts", query, key) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    visible = visible.expand(scores.shape)
    lowest = torch.where(visible, scores, torch.finfo(scores.dtype).min).amax(-1, keepdim=True).detach()
    numerator = torch.where(visible, (torch.where(visible, scores, lowest) - lowest).exp(), 0)
    total = numerator.sum(-1, keepdim=True)
    out = torch.einsum("bhts,bhsd->bhtd", numerator / total.clamp_min(torch.finfo(scores.dtype).tiny), value)
    return out, torch.where(total[..., 0] > 0, lowest[..., 0] + total[..., 0].log(), -torch.inf)


def visibility(
    rows: int,
    keys: int,
    *,
    is_causal: bool = False,
    window: tuple[int | None, int | None] = (None, None),
    offset: int | None = None,
    prefix: int = 0,
    key_padding: Tensor | None = None,
    query_segments: Tensor | None = None,
    key_segments: Tensor | None = None,
) -> Tensor:
    """The visibility matrix (B or 1, 1, T, S) of a mask's fields, pair by pair in Python: slow and plain."""
    start = keys - rows if offset is None else offset
    batch = max([1, *(len(x) for x in (key_padding, query_segments) if x is not None)])
    left, right = window
    # Lists, because reading one element of a tensor takes longer than all the rest.
    real, of_queries, of_keys = (None if x is None else x.tolist() for x in (key_padding, query_segments, key_segments))

    def sees(b: int, t: int, s: int) -> bool:
        position = t + start
        near = (left is None or s >= position - left) and (right is None or s <= position + right)
        here = (near and (not is_causal or s <= position)) or s < prefix
        if real is not None:
            here = here and bool(real[b][s])
        if of_queries is not None and of_keys is not None:
            here = here and of_queries[b][t] == of_keys[b][s]
        return here

    seen = [sees(b, t, s) for b in range(batch) for t in range(rows) for s in range(keys)]
    return torch.tensor(seen, dtype=torch.bool).view(batch, 1, rows, keys)


def sharp_inputs(
    batch: int,
    heads: int,
    kv_heads: int,
    rows: int,
    keys: int,
    head_dim: int,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    sharpness: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key and value whose softmax is sharp: near-uniform weights hide a wrong scale or head order."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    query, key = (sharpness * draw(batch, h, n, head_dim) for h, n in ((heads, rows), (kv_heads, keys)))
    value = draw(batch, kv_heads, keys, head_dim_v or head_dim)
    return query.to(dtype), key.to(dtype), value.to(dtype)


__all__ = [
    "allowed_error",
    "assert_close_to_reference",
    "closeness",
    "dense_attention",
    "sharp_inputs",
    "visibility",
]
