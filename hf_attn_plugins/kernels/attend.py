"""`attend`: attention of any shape as a `Partial`, by the kernel that suits device, dtype and shape."""

from __future__ import annotations

import math

from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window, one_mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.choose import choose


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Window | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
) -> Partial:
    """Softmax attention with its log-sum-exp: softmax(scale * query key^T) value over the keys that the mask allows.

    Differentiable in query, key, value (and a float mask) through both `out` and `lse`. Memory grows linearly with S.

    Args:
        query: (B, Hq, T, D), any strides; float64, float32, bfloat16 or float16.
        key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), same dtype and device; Hq must be a multiple of Hkv, and head h
            of the query reads head h // (Hq // Hkv).
        is_causal: row t sees keys 0 .. S - T + t (aligned to the bottom right) or, where the mask says so, its offset.
        mask: a `Mask`, or as the last resort a bool (True = attend) or float (added) tensor that broadcasts to
            (B, Hq, T, S).
        scale: factor of the scores, D**-0.5 when None.
        softcap: c replaces scores s by c * tanh(s / c), after scaling and before any mask.
        window: an int w for the last w keys, or (left, right); see `core.mask.window_of`.
        dropout: probability of dropping a weight after normalisation; the lse is that of the undropped weights. Which
            weights are dropped follows from `Mask.drops`, the same in every kernel.
        kernel: one of `KERNELS` by name, which then runs or raises; None lets `kernels.choose` decide.

    Returns:
        `Partial` with out (B, Hq, T, Dv) in the dtype of the query and lse (B, Hq, T).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; the message says which.
        NotImplementedError: the named kernel cannot do what was asked.

    Source: FlashAttention, arXiv 2205.14135 (forward, lse) and 2307.08691 (backward from the lse).
    """
    rows, head_dim, num_keys = _checked(query, key, value, dropout)
    scale = 1.0 / math.sqrt(head_dim) if scale is None else float(scale)
    whole = one_mask(mask, is_causal, window)
    if dropout:
        whole = whole.dropping(dropout, query, key)
    trimmed, keys = whole.trimmed(rows, num_keys)
    if keys.start > 0 or keys.stop < num_keys:
        key, value = key[:, :, keys], value[:, :, keys]
    choice = choose(query, key, value, trimmed, softcap, dropout, kernel)
    return choice.run(query, key, value, trimmed, scale, softcap, dropout)


def _checked(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> tuple[int, int, int]:
    """Rows, head_dim and keys of a call whose arguments fit together. Sizes are read once: every short call asks."""
    q, k, v = query.shape, key.shape, value.shape
    if len(q) == len(k) == len(v) == 4:
        (batch, heads, rows, head_dim), (batch_k, heads_k, keys, head_dim_k), (batch_v, heads_v, keys_v, _) = q, k, v
        fits = batch == batch_k == batch_v and heads_k == heads_v and keys == keys_v and head_dim == head_dim_k
        same = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
        if fits and same and heads_k > 0 and heads % heads_k == 0 and query.is_floating_point() and 0.0 <= dropout < 1:
            return rows, head_dim, keys
    raise ValueError(_misfit(query, key, value, dropout))


def _misfit(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> str:
    """What is wrong with the arguments of a call that `_checked` refuses."""
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        return f"query, key and value must be 4-d (batch, heads, tokens, head_dim), got {shapes}."
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        return f"query, key and value must have one batch size, got {shapes}."
    if key.shape[1:3] != value.shape[1:3]:
        return f"key and value must agree in heads and tokens, got {shapes}."
    if query.shape[-1] != key.shape[-1]:
        return f"query and key must have one head_dim, got {shapes}."
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        return f"query heads must be a multiple of key heads, got {shapes}."
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        return (
            f"query, key and value must have one float dtype, got {query.dtype}, {key.dtype}, {value.dtype}: "
            "cast them first (hf_attn_plugins.hf.calls.interface does so under autocast)."
        )
    if not query.device == key.device == value.device:
        return f"query, key and value are on {query.device}, {key.device} and {value.device}: use one device."
    return f"dropout={dropout}: a probability in [0, 1) is needed."
