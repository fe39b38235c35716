"""The functions of an exported kernel repository (`hf-attn export-kernel`), under the names Transformers looks for.

No import of Transformers here: the exported folder holds this file, `core` and `kernels`, and loads on its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window, window_of
from hf_attn_plugins.core.partial import with_sinks
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.hub_masks import structured
from hf_attn_plugins.kernels.varlen import attend_varlen

supports_flash_attn = True  # Transformers registers `flash_attn_forward` as it is, with the mask function of sdpa
_REFUSED = ("indices", "block_indices", "block_table")


def flash_attn_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention call, exact; masks as `sdpa_mask` makes them.

    Args:
        module: the attention module; only its `is_causal` is read, where the call itself does not say.
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), not repeated.
        attention_mask: bool (True = attend) or float (added), broadcastable to (B, Hq, T, S); or (B, K), the real keys,
            of which those behind the K-th are not read; None for no mask, then causal from the top left like PyTorch's
            `is_causal`, or everything for one row. Padding and causal order are recognised in a bool mask (B, 1, T, S).
        sliding_window: the last w keys, oneself included; a mask tensor (B, Hq, T, S) has it already.
        s_aux, sinks: learned sink logits (Hq,), which enter the softmax's denominator once.
        position_bias: float (1 or B, Hq, T, S), added to the scaled scores.
        cu_seq_lens_q, cu_seq_lens_k: (n + 1,) where packed sequences begin; with no mask, or in continuous batching
            (`read_index` among the keywords), they say everything and no T x S mask is read.

    Returns:
        ((B, T, Hq, Dv) contiguous, None).

    Raises:
        NotImplementedError: keywords that would change the result: `indices`, `block_indices`, `block_table`.
    """
    for name in _REFUSED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'this kernel does not take `{name}`: use attn_implementation="eager" or "sdpa".')
    query, key, value = _one_dtype(query, key, value)
    said = getattr(module, "is_causal", True) if is_causal is None else is_causal
    numbers: dict[str, Any] = {"scale": scaling, "softcap": softcap, "dropout": dropout}
    if cu_seq_lens_q is not None and (attention_mask is None or kwargs.get("read_index") is not None):
        found = attend_varlen(
            query, key, value, cu_seq_lens_q, cu_seq_lens_k, is_causal=bool(said), window=sliding_window, **numbers
        )
    else:
        if attention_mask is not None and attention_mask.ndim == 2:  # a static cache has room behind the mask's keys
            key, value = (x[:, :, : attention_mask.shape[1]] for x in (key, value))
        mask = _mask(query, key, attention_mask, bool(said), sliding_window, position_bias)
        found = attend(query, key, value, mask=mask, **numbers)
    sink = sinks if s_aux is None else s_aux
    found = with_sinks(found, None if sink is None else sink.float())
    return found.out.transpose(1, 2).contiguous(), None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """flash-attention's function of that name: (T, Hq, D), (S, Hkv, D), (S, Hkv, Dv) -> (T, Hq, Dv); exact, any device.

    `max_seqlen_q`, `max_seqlen_k` and `deterministic` are accepted and not needed. Sinks `s_aux` (Hq,) as in FA 3.
    """
    query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    found = attend_varlen(
        query, key, value, cu_seqlens_q, cu_seqlens_k, is_causal=causal, window=_window(window_size, causal),
        scale=softmax_scale, softcap=softcap or None, dropout=dropout_p,
    )  # fmt: skip
    found = with_sinks(found, None if s_aux is None else s_aux.float())
    return found.out.squeeze(0).transpose(0, 1).contiguous()


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    s_aux: Tensor | None = None,
) -> Tensor:
    """flash-attention's function of that name: (B, T, Hq, D) and (B, S, Hkv, D) -> (B, T, Hq, Dv).

    Causal is aligned to the bottom right.
    """
    query, key, value = (x.transpose(1, 2) for x in (q, k, v))
    found = attend(
        query, key, value, is_causal=causal, window=_window(window_size, causal), scale=softmax_scale,
        softcap=softcap or None, dropout=dropout_p,
    )  # fmt: skip
    return with_sinks(found, None if s_aux is None else s_aux.float()).out.transpose(1, 2).contiguous()


def _window(size: tuple[int, int], causal: bool) -> Window | None:
    left, right = (None if side is None or side < 0 else int(side) for side in size)
    return None if left is None and (right is None or causal) else (left, None if causal else right)


def _mask(
    query: Tensor, key: Tensor, given: Tensor | None, causal: bool, window: int | None, bias: Tensor | None
) -> Mask:
    if given is None:
        binds = causal and query.shape[2] > 1
        mask = Mask(causal=True, window=window_of(window), offset=0) if binds else Mask()
    else:
        mask = structured(given, query, key, causal, window) or Mask(bias=given)
    if bias is None:
        return mask
    if mask.bias is None:
        return mask.replace(bias=bias)
    have = mask.bias
    return mask.replace(bias=torch.where(have, bias, -torch.inf) if have.dtype == torch.bool else have + bias)


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype, autocast's where it is on: under autocast values may arrive in another than queries."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


__all__ = ["flash_attn_forward", "flash_attn_func", "flash_attn_varlen_func", "supports_flash_attn"]
