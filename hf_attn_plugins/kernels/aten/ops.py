"""PyTorch's fused attention operators as differentiable functions of query, key and value that return (out, lse)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_attn_plugins.core.compat import fused_operator, rng_state_of_flash
from hf_attn_plugins.core.partial import lse_dtype


def flash_cpu(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, Hq, T, Dv) and lse (B, Hq, T) of one CPU operator call; `bias` is added to the scaled scores.

    A causal mask is square: T == S. Without gradient; D == Dv.
    """
    query, key, value = elements_side_by_side(query, key, value)
    operator = fused_operator("_scaled_dot_product_flash_attention_for_cpu")
    return operator(query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale)


def elements_side_by_side(*tensors: Tensor) -> list[Tensor]:
    """The tensors with stride 1 in their last dimension, copied only where it is another.

    The fused operators read a head's elements side by side whatever the stride says; `F.scaled_dot_product_attention`
    looks at it, and calls them only where it is 1.
    """
    return [tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous() for tensor in tensors]


class FlashCPU(torch.autograd.Function):
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
        grad_out, query, key, value, out = _lse_as_column(grads, query, key, value, out)
        operator = fused_operator("_scaled_dot_product_flash_attention_for_cpu_backward")
        d_query, d_key, d_value = operator(
            grad_out, query, key, value, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale
        )
        return d_query[..., :width], d_key[..., :width], d_value[..., :width], None, None, None


def _lse_as_column(
    grads: tuple[Tensor | None, ...], query: Tensor, key: Tensor, value: Tensor, out: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pass the lse's gradient through an operator that only takes the gradient of out.

    The operators compute delta = sum(grad_out * out) and dS = P * (grad_out value^T - delta); the lse asks for
    delta - grad_lse. Extra columns that are 0 in value, 1 in grad_out and -grad_lse in out change nothing else.
    """
    grad_out, grad_lse = grads
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    if grad_lse is None:
        return grad_out.contiguous(), query, key, value, out
    extra = 8  # keeps rows aligned for the kernels
    query, key, value, grad_out, out = (F.pad(x, (0, extra)) for x in (query, key, value, grad_out, out))
    # Two columns, high and low part, keep the lse's gradient exact to float32 in low-precision tensors.
    high = grad_lse.to(out.dtype)
    out[..., -2], out[..., -1] = -high, -(grad_lse - high.to(grad_lse.dtype)).to(out.dtype)
    grad_out[..., -2:] = 1
    return grad_out, query, key, value, out


class FlashCUDA(torch.autograd.Function):
    """The CUDA twins: flash attention in half precision, the memory-efficient kernel otherwise."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        query, key, value = elements_side_by_side(query, key, value)
        ctx.group_size = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(ctx.group_size, 1) if ctx.group_size > 1 else x for x in (key, value))
        ctx.half = query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] % 8 == 0
        if ctx.half:
            operator = fused_operator("_scaled_dot_product_flash_attention")
            out, lse, *rest = operator(query, key, value, 0.0, is_causal, False, scale=scale)
            ctx.rest = rng_state_of_flash(rest)
        else:
            operator = fused_operator("_scaled_dot_product_efficient_attention")
            out, lse, *ctx.rest = operator(query, key, value, None, True, 0.0, is_causal, scale=scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = (is_causal, scale)
        return out, lse[..., : query.shape[2]].to(lse_dtype(query))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        is_causal, scale = ctx.options
        width = value.shape[-1]
        grad_out, query, key, value, out = _lse_as_column(grads, query, key, value, out)
        if ctx.half:
            cum_q, cum_k, max_q, max_k, seed, offset = ctx.rest
            operator = fused_operator("_scaled_dot_product_flash_attention_backward")
            d_query, d_key, d_value = operator(
                grad_out,
                query,
                key,
                value,
                out,
                lse,
                cum_q,
                cum_k,
                max_q,
                max_k,
                0.0,
                is_causal,
                seed,
                offset,
                scale=scale,
            )
        else:
            seed, offset = ctx.rest
            operator = fused_operator("_scaled_dot_product_efficient_attention_backward")
            d_query, d_key, d_value, _ = operator(
                grad_out,
                query,
                key,
                value,
                None,
                out,
                lse,
                seed,
                offset,
                0.0,
                [True, True, True, False],
                is_causal,
                scale=scale,
            )
        if ctx.group_size > 1:
            d_key, d_value = (x.unflatten(1, (-1, ctx.group_size)).sum(2) for x in (d_key, d_value))
        return d_query[..., :width], d_key[..., :width], d_value[..., :width], None, None, None
