"""Exchanges as autograd functions: the backward of `all_gather` is a reduce-scatter of the gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AllGather(torch.autograd.Function):
    """`Group.all_gather`. Its backward sends every rank the gradients of its shard, and each rank adds up what came."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, tensor: Tensor, sizes: Sequence[int] | None, dim: int, what: str
    ) -> tuple[Tensor, ...]:
        """Every rank's `tensor`, in the order of the ranks."""
        ctx.group, ctx.what, ctx.shape = group, what, tensor.shape
        return tuple(group._all_gather(tensor, sizes, dim, what))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The sum over ranks of the gradients of this rank's shard."""
        shard_grads = ctx.group._all_to_all(grads, [ctx.shape] * ctx.group.size, f"{ctx.what} (backward)")
        return None, torch.stack(shard_grads).sum(0), None, None, None
