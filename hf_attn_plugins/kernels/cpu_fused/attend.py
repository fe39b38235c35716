"""Attention for CPUs, fused in C: what `kernels.cpu` does in plain PyTorch, without its traffic.

Scores, weights and their sums never leave a core's nearest cache, so little is left to do but the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.compat import is_transforming
from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.cpu_fused.call import backward, forward, reason_against
from hf_attn_plugins.kernels.rectangle_tables import flat


def cpu_fused(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. Memory besides inputs and output: with AMX a copy of value (backward: of all but out)."""
    return cpu_fused_rectangles(query, key, value, mask, scale, softcap, dropout, [])


def cpu_fused_rectangles(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float,
    plan: Sequence[Sequence[Rectangle]],
) -> Partial:  # fmt: skip
    """One launch over `plan`, one list of rectangles per row of the batch or one for all; [] means every pair."""
    reason = reason_against(query, key, value, mask, softcap, dropout)
    if reason is not None:
        raise NotImplementedError(f"kernel 'cpu_fused' cannot do {reason}: use kernel=None, or 'cpu_tiled'.")
    return unasked(query, key, value, mask, scale, softcap, dropout, plan)


def unasked(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float,
    plan: Sequence[Sequence[Rectangle]] = (),
) -> Partial:  # fmt: skip
    """`cpu_fused_rectangles` for a caller that has asked `reason_against` itself."""
    if torch.compiler.is_compiling():
        from hf_attn_plugins.kernels.cpu_ops import tiled_op

        return tiled_op(query, key, value, mask, scale, softcap, dropout, fused=True)
    if isinstance(mask.offset, Tensor):
        mask = mask.replace(offset=int(mask.offset))  # a static cache counts on before backward runs
    places = tuple(flat(plan)) if plan else ()
    learned = needs_gradient(query, key, value) or (mask.bias is not None and needs_gradient(mask.bias))
    if not (learned or is_transforming()):  # an `autograd.Function` takes as long as everything else in Python
        return forward(query, key, value, mask, scale, softcap, places, None, dropout)
    return Partial(*_Fused.apply(query, key, value, mask.bias, mask, scale, softcap, places, dropout))


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Mask, scale: float,
        softcap: float | None, plan: tuple[int, ...], dropout: float,
    ) -> Any:  # fmt: skip
        ctx.set_materialize_grads(False)
        keep = any(ctx.needs_input_grad) and query.dtype == torch.float32
        rest = query.new_zeros(query.shape[:-1]) if keep else None
        out, lse = forward(query, key, value, mask, scale, softcap, plan, rest, dropout)
        ctx.save_for_backward(
            query, key, value, out, lse, rest, bias, mask.key_padding, mask.query_segments, mask.key_segments
        )
        ctx.mask = mask.replace(bias=None, key_padding=None, query_segments=None, key_segments=None)
        ctx.scale, ctx.softcap, ctx.plan, ctx.dropout = scale, softcap, plan, dropout
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True asks for gradients of gradients, which kernel 'cpu_fused' does not have: use "
                "kernel='reference'."
            )
        grad_out, grad_lse = grads
        query, key, value, out, lse, rest, bias, padding, query_segments, key_segments = ctx.saved_tensors
        mask = ctx.mask.replace(
            bias=bias, key_padding=padding, query_segments=query_segments, key_segments=key_segments
        )
        options = (mask, ctx.scale, ctx.softcap, ctx.plan, rest, ctx.needs_input_grad[3], ctx.dropout)
        return (*backward(grad_out, grad_lse, query, key, value, out, lse, *options), *[None] * 5)
