"""`cpu_tiled`: attention by tiles in plain PyTorch, forward (`forward.py`) and backward (`backward.py`) together."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.cpu.backward import backward
from hf_attn_plugins.kernels.cpu.forward import forward
from hf_attn_plugins.kernels.cpu.tiling import SHORT, sizes


def cpu_tiled(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. Extra memory: the scores of a chunk of heads (`tiling.SCORES`), in bfloat16 its keys, too.

    Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
    """
    if torch.compiler.is_compiling():
        from hf_attn_plugins.kernels.cpu_ops import tiled_op

        return tiled_op(query, key, value, mask, scale, softcap, dropout)
    drops = mask.drops
    joined = len(query) > 1 and query.shape[2] < SHORT and mask.has_no_tensors() and (drops is None or drops.is_shared)
    if joined and sizes(query, key, mask)[2] > key.shape[1]:
        # (B, H, ...) -> (1, B * H, ...): without tensors in the mask all rows of the batch share it, and one product
        # of many heads is faster than several small ones.
        q, k, v = (x.reshape(1, x.shape[0] * x.shape[1], *x.shape[2:]) for x in (query, key, value))
        if drops is not None:
            mask = mask.replace(drops=drops.joined())
        out, lse = cpu_tiled(q, k, v, mask, scale, softcap, dropout)
        return Partial(out.view(*query.shape[:3], value.shape[-1]), lse.view(query.shape[:3]))
    return Partial(*_Tiled.apply(query, key, value, mask.bias, mask, scale, softcap, dropout))


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *options: Any) -> Any:
        ctx.set_materialize_grads(False)
        out, lse = forward(query, key, value, *options)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        grad_out, grad_lse = grads
        query, key, value, out, lse = ctx.saved_tensors
        mask, scale, softcap, dropout = ctx.options
        needs_bias = ctx.needs_input_grad[3]
        inputs = (query, key, value, out, lse, mask, scale, softcap, dropout, needs_bias)
        return (*backward(grad_out, grad_lse, *inputs), *[None] * 4)
