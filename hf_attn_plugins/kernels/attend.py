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
        dropout: probability of dropping a weight after normalisation; the lse is that of the undropped weights.
        kernel: one of `KERNELS` by name, which then runs or raises; None lets `kernels.choose` decide.

    Returns:
        `Partial` with out (B, Hq, T, Dv) in the dtype of the query and lse (B, Hq, T).

    Raises:
        ValueError: shapes, dtypes, devices or options that do not fit; the message says which.
        NotImplementedError: the named kernel cannot do what was asked.

    Source: FlashAttention, arXiv 2205.14135 (forward, lse) and 2307.08691 (backward from the lse).
    """
    _check(query, key, value, dropout)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
    whole = one_mask(mask, is_causal, window)
    trimmed, keys = whole.trimmed(query.shape[2], key.shape[2])
    if keys.start > 0 or keys.stop < key.shape[2]:
        key, value = key[:, :, keys], value[:, :, keys]
    choice = choose(query, key, value, trimmed, softcap, dropout, kernel)
    return choice.run(query, key, value, trimmed, scale, softcap, dropout)


def _check(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> None:
    q, k, v = query.shape, key.shape, value.shape
    fits = len(q) == len(k) == len(v) == 4 and q[0] == k[0] and k[:3] == v[:3] and q[3] == k[3] and k[1] > 0
    same = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    if fits and same and q[1] % k[1] == 0 and query.is_floating_point() and 0.0 <= dropout < 1.0:
        return
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if not query.ndim == key.ndim == value.ndim == 4:
        raise ValueError(f"query, key and value must be 4-d (batch, heads, tokens, head_dim), got {shapes}.")
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(f"query, key and value must have one batch size, got {shapes}.")
    if key.shape[1:3] != value.shape[1:3]:
        raise ValueError(f"key and value must agree in heads and tokens, got {shapes}.")
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query and key must have one head_dim, got {shapes}.")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key heads, got {shapes}.")
    if not query.dtype == key.dtype == value.dtype or not query.is_floating_point():
        raise ValueError(
            f"query, key and value must have one float dtype, got {query.dtype}, {key.dtype}, {value.dtype}: "
            "cast them first (hf_attn_plugins.hf.calls.interface does so under autocast)."
        )
    if not query.device == key.device == value.device:
        raise ValueError(
            f"query, key and value are on {query.device}, {key.device} and {value.device}: use one device."
        )
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout={dropout}: a probability in [0, 1) is needed.")
