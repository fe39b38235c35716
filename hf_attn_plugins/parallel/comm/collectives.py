"""Exchanges as autograd functions: what a rank gave away comes back as the gradients of those who used it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class AllToAll(torch.autograd.Function):
    """`Group.all_to_all`; backward is the same exchange the other way round."""

    @staticmethod
    def forward(ctx: Any, group: Any, shapes: list[tuple[int, ...]], what: str, *pieces: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.what, ctx.shapes = group, what, [piece.shape for piece in pieces]
        return tuple(group._all_to_all(pieces, shapes, what))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return (None, None, None, *ctx.group._all_to_all(grads, ctx.shapes, f"{ctx.what} (backward)"))


class AllGather(torch.autograd.Function):
    """`Group.all_gather`; backward sends every rank the gradients of its shard, where they are summed."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, tensor: Tensor, sizes: Sequence[int] | None, dim: int, what: str
    ) -> tuple[Tensor, ...]:
        ctx.group, ctx.what, ctx.shape = group, what, tensor.shape
        return tuple(group._all_gather(tensor, sizes, dim, what))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        found = ctx.group._all_to_all(grads, [ctx.shape] * ctx.group.size, f"{ctx.what} (backward)")
        return None, torch.stack(found).sum(0), None, None, None
