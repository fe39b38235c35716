"""The Triton kernels as PyTorch operators, for `torch.compile`, fake tensors and autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.kernels.segment_labels import Labels
from hf_attn_plugins.kernels.triton import launch as triton_launch
from hf_attn_plugins.kernels.triton.launch import Call

OPTIONS = (
    "Tensor? row_labels, Tensor? key_labels, Tensor? bias, Tensor? offset_tensor, Tensor? row_hashes, "
    "Tensor? key_hashes, float scale, float? softcap, SymInt? left, SymInt? right, SymInt offset, "
    "float dropout, int[] pieces"
)
NUM_OPTIONS = OPTIONS.count(",") + 1


@torch.library.custom_op(
    "hf_attn_plugins::triton_attention",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor value, {OPTIONS}) -> (Tensor, Tensor, Tensor)",
)
def triton_attention(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`launch.forward`: out, lse and row_lse, which the backward reads. `options` are listed in `OPTIONS`."""
    return triton_launch.forward(query, key, value, _call(*options))


@triton_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, rows, _ = query.shape
    out = query.new_empty(batch, rows, heads, value.shape[-1]).transpose(1, 2)
    lse, row_lse = (query.new_empty(batch, heads, rows, dtype=torch.float32) for _ in range(2))
    return out, lse, row_lse


@torch.library.custom_op(
    "hf_attn_plugins::triton_attention_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor row_lse, "
        f"{OPTIONS}) -> (Tensor, Tensor, Tensor)"
    ),
)
def triton_attention_backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, row_lse: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`launch.backward`: the gradients of query, key and value, bit for bit the same in every run."""
    return triton_launch.backward(grad_out, grad_lse, query, key, value, out, row_lse, _call(*options))


@triton_attention_backward.register_fake
def _(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor) -> Tensor:
        batch, heads, tokens, dim = tensor.shape
        return tensor.new_empty(batch, tokens, heads, dim).transpose(1, 2)

    return like(query), like(key), like(value)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    query, key, value, row_labels, key_labels, bias, offset_tensor, row_hashes, key_hashes, *plain = inputs
    out, _, row_lse = output
    ctx.mark_non_differentiable(row_lse)
    side = (row_labels, key_labels, bias, offset_tensor, row_hashes, key_hashes)
    ctx.save_for_backward(query, key, value, out, row_lse, *side)
    ctx.plain = plain
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    query, key, value, out, row_lse, *side = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    gradients = triton_attention_backward(grad_out, grad_lse, query, key, value, out, row_lse, *side, *ctx.plain)
    return (*gradients, *[None] * NUM_OPTIONS)


triton_attention.register_autograd(_backward, setup_context=_setup_context)


def _call(
    row_labels: Tensor | None, key_labels: Tensor | None, bias: Tensor | None, offset_tensor: Tensor | None,
    row_hashes: Tensor | None, key_hashes: Tensor | None, scale: float, softcap: float | None, left: int | None,
    right: int | None, offset: int, dropout: float, pieces: list[int],
) -> Call:  # fmt: skip
    labels = None if key_labels is None else Labels(row_labels, key_labels)
    return Call(
        scale, softcap, left, right, offset if offset_tensor is None else offset_tensor, labels, bias, dropout,
        row_hashes, key_hashes, tuple(pieces),
    )  # fmt: skip
