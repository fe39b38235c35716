"""PyTorch's fused attention operator for CPUs: functions that return (out, lse), with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.compat import fused_operator


def flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, Dv) and lse (B, Hq, T) of one call of the CPU operator, without gradients.

    Args:
        query, key, value: (B, Hq, T, D), (B, Hkv, S, D) and (B, Hkv, S, Dv) with D == Dv.
        is_causal: a square causal mask, T == S.
        scale: factor of the scores.
        bias: broadcasts to (B, Hq, T, S), in the query's dtype, added to the scaled scores; or None.
    """
    query, key, value = elements_side_by_side(query, key, value)
    operator = fused_operator("_scaled_dot_product_flash_attention_for_cpu")
    return operator(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)


def elements_side_by_side(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors with stride 1 in their last dimension; those with another stride are copied.

    The operators ignore this stride and read a head's elements as neighbours. `F.scaled_dot_product_attention` checks
    the stride before it calls them.
    """
    if query.stride()[-1] == key.stride()[-1] == value.stride()[-1] == 1:  # faster than stride(-1), in every short call
        return query, key, value
    return _copied(query), _copied(key), _copied(value)


def _copied(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


class FlashCPU(torch.autograd.Function):
    """`flash_cpu` with gradients of query, key and value, through out and lse."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        query, key, value = elements_side_by_side(query, key, value)
        out, lse = flash_cpu(query, key, value, is_causal, scale, bias)
        ctx.save_for_backward(query, key, value, out, lse, bias)
        ctx.options = (is_causal, scale)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse, bias = ctx.saved_tensors
        is_causal, scale = ctx.options
        width = value.shape[-1]
        grad_out, query, key, value, out = lse_as_column(grads, query, key, value, out)
        operator = fused_operator("_scaled_dot_product_flash_attention_for_cpu_backward")
        d_query, d_key, d_value = operator(
            grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return d_query[..., :width], d_key[..., :width], d_value[..., :width], None, None, None


def lse_as_column(
    grads: tuple[Tensor | None, ...], query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments that pass the gradient of the lse to an operator which takes only the gradient of out.

    The operators compute delta = sum(grad_out * out) and dS = P * (grad_out value^T - delta). The gradient of the lse
    must be subtracted from delta. Extra columns do this: 1 in grad_out, -grad_lse in out and 0 in the others, so that
    they change nothing else.
    """
    grad_out, grad_lse = grads
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_lse is None:
        return grad_out.contiguous(), query, key, value, out
    extra = 8  # columns; rows stay aligned
    query, key, value, grad_out, out = (F.pad(x, (0, extra)) for x in (query, key, value, grad_out, out))
    # Two columns, a high and a low part, keep more digits of the gradient than one in a low-precision tensor.
    high = grad_lse.to(out.dtype)
    out[..., -2], out[..., -1] = -high, -(grad_lse - high.to(grad_lse.dtype)).to(out.dtype)
    grad_out[..., -2:] = 1
    return grad_out, query, key, value, out
