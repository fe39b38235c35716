"""The tiles as custom operators, so that torch.compile and torch.export see one node instead of a Python loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.drops import Drops
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.cpu.backward import backward
from hf_attn_plugins.kernels.cpu.forward import forward
from hf_attn_plugins.kernels.cpu_fused import call as compiled

NO_BOUND = -1


def tiled_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    scale: float,
    softcap: float | None,
    dropout: float,
    fused: bool = False,
) -> Partial:
    """See `kernels.attend`; `fused` takes the compiled kernels.

    A predicate, which no operator can carry, is evaluated to a mask tensor first.
    """
    bias = mask.bias
    if mask.predicate is not None:
        if bias is not None:
            raise NotImplementedError("a mask tensor beside a mask function cannot be compiled: pass one of them.")
        rows, keys = (torch.arange(n, device=query.device) for n in (query.shape[2], key.shape[2]))
        start = key.shape[2] - query.shape[2] if mask.offset is None else mask.offset
        bias = Mask(predicate=mask.predicate).visible(rows, keys, start, query.shape[0])
    offset = mask.offset if isinstance(mask.offset, Tensor) else None
    start = key.shape[2] - query.shape[2] if mask.offset is None else 0 if offset is not None else mask.offset
    drops = (None,) * 4 if mask.drops is None else tuple(mask.drops)
    left, right = (NO_BOUND if side is None else side for side in mask.window)
    structure = (mask.key_padding, mask.query_segments, mask.key_segments, bias, offset, *drops)
    return Partial(
        *tiled_forward(
            query, key, value, *structure, start, mask.causal, left, right, mask.prefix, scale, softcap or 0.0, dropout,
            fused,
        )
    )  # fmt: skip


def _mask(structure: tuple[Tensor | None, ...], start: int, causal: bool, left: int, right: int, prefix: int) -> Mask:
    key_padding, query_segments, key_segments, bias, offset, *drops = structure
    return Mask(
        causal=causal,
        window=(None if left == NO_BOUND else left, None if right == NO_BOUND else right),
        offset=start if offset is None else int(offset),
        prefix=prefix,
        key_padding=key_padding,
        query_segments=query_segments,
        key_segments=key_segments,
        bias=bias,
        drops=None if drops[0] is None else Drops(*drops),  # type: ignore[arg-type]
    )


@torch.library.custom_op("hf_attn_plugins::tiled_forward", mutates_args=(), device_types="cpu")
def tiled_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    lanes: Tensor | None,
    row_places: Tensor | None,
    key_places: Tensor | None,
    start: int,
    causal: bool,
    left: int,
    right: int,
    prefix: int,
    scale: float,
    softcap: float,
    dropout: float,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """`kernels.cpu.forward` with the mask spread out into tensors and numbers; softcap 0 means none."""
    structure = (key_padding, query_segments, key_segments, bias, offset, seed, lanes, row_places, key_places)
    mask = _mask(structure, start, causal, left, right, prefix)
    if fused:
        return compiled.forward(query, key, value, mask, scale, softcap or None, (), None, dropout)
    return forward(query, key, value, mask, scale, softcap or None, dropout)


@tiled_forward.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    fused, head_dim_v = rest[-1], value.shape[-1]
    out, lse = Partial.unfilled(query, head_dim_v)
    return out if fused else query.new_empty(*query.shape[:-1], head_dim_v), lse


@torch.library.custom_op("hf_attn_plugins::tiled_backward", mutates_args=(), device_types="cpu")
def tiled_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    key_padding: Tensor | None,
    query_segments: Tensor | None,
    key_segments: Tensor | None,
    bias: Tensor | None,
    offset: Tensor | None,
    seed: Tensor | None,
    lanes: Tensor | None,
    row_places: Tensor | None,
    key_places: Tensor | None,
    start: int,
    causal: bool,
    left: int,
    right: int,
    prefix: int,
    scale: float,
    softcap: float,
    dropout: float,
    fused: bool,
    needs_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`kernels.cpu.backward.backward`; the gradient of bias is empty where none is needed."""
    structure = (key_padding, query_segments, key_segments, bias, offset, seed, lanes, row_places, key_places)
    mask = _mask(structure, start, causal, left, right, prefix)
    inputs = (grad_out, grad_lse, query, key, value, out, lse, mask, scale, softcap or None)
    if fused:
        *grads, grad_bias = compiled.backward(*inputs, (), None, needs_bias, dropout)
    else:
        *grads, grad_bias = backward(*inputs, dropout, needs_bias)
    return (*grads, query.new_empty(0) if grad_bias is None else grad_bias)  # type: ignore[return-value]


@tiled_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    bias, needs_bias = rest[5], rest[-1]
    grads = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    return (*grads, torch.empty_like(bias) if needs_bias else query.new_empty(0))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:12], *output)
    ctx.options = inputs[12:]


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, *structure, out, lse = ctx.saved_tensors
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    grad_lse = torch.zeros_like(lse) if grad_lse is None else grad_lse
    needs_bias = ctx.needs_input_grad[6]
    d_query, d_key, d_value, d_bias = tiled_backward(
        grad_out, grad_lse, query, key, value, out, lse, *structure, *ctx.options, needs_bias
    )
    return (d_query, d_key, d_value, None, None, None, d_bias if needs_bias else None, *[None] * (5 + len(ctx.options)))


tiled_forward.register_autograd(_backward, setup_context=_setup)
