"""Exchanges as autograd functions. Their backward sends gradients the other way, and each rank adds up what came.

All ranks must run every backward exchange. A rank on which no result of an exchange enters the loss would leave it out.
`tie` connects such an exchange to the rank's result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.tensor_bytes import from_bytes, num_bytes, to_bytes

Spec = tuple[tuple[int, ...], torch.dtype]  # shape and dtype of a tensor that arrives


class AllGather(torch.autograd.Function):
    """`Group.all_gather`. Its backward sends every rank the gradients of its shard, and each rank adds up what came."""

    @staticmethod
    def forward(
        ctx: Any, group: Any, tensor: Tensor, finish: Callable[[], list[Tensor]], what: str
    ) -> tuple[Tensor, ...]:
        """Every rank's `tensor`, in the order of the ranks, for which `finish` waits."""
        ctx.group, ctx.what, ctx.shape = group, what, tensor.shape
        return tuple(finish())

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The sum over ranks of the gradients of this rank's shard."""
        shard_grads = ctx.group.all_to_all(grads, [ctx.shape] * ctx.group.size, what=f"{ctx.what} (backward)")
        return None, added(shard_grads), None, None


class GatherPartials(torch.autograd.Function):
    """`Group.gather_partials`. Its backward returns the gradients of out and lse to the rank that computed them."""

    @staticmethod
    def forward(ctx: Any, group: Any, what: str, out: Tensor, lse: Tensor) -> tuple[Tensor, ...]:
        """out of every rank, then lse of every rank, both in the order of the ranks."""
        ctx.group, ctx.what = group, what
        ctx.specs = [(tuple(x.shape), x.dtype) for x in (lse, out)]
        parts = group._gather_partials(Partial(out, lse), what)
        return (*(part.out for part in parts), *(part.lse for part in parts))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The sums over ranks of the gradients of this rank's out and lse."""
        size = ctx.group.size
        # The lse comes first: it has the larger element size, so that both lie aligned in the message.
        given = [[lse, out] for out, lse in zip(grads[:size], grads[size:], strict=True)]
        arrived = exchange(ctx.group, given, [ctx.specs] * size, f"{ctx.what} (backward)")
        lse, out = (added(column) for column in zip(*arrived, strict=True))
        return None, None, out, lse


class Swap(torch.autograd.Function):
    """`swap` with gradients."""

    @staticmethod
    def forward(
        ctx: Any,
        group: Any,
        what: str,
        counts: list[int],
        taken: Sequence[Sequence[Spec]],
        anchor: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        """The tensors that arrive, rank by rank, and an empty one."""
        ctx.group, ctx.what, ctx.taken, ctx.anchor = group, what, [len(each) for each in taken], anchor.shape
        ctx.given = per_rank([(tuple(x.shape), x.dtype) for x in tensors], counts)
        arrived = exchange(group, per_rank(tensors, counts), taken, what)
        return (*(x for each in arrived for x in each), anchor.new_empty(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradients that return, rank by rank."""
        returned = exchange(ctx.group, per_rank(grads[:-1], ctx.taken), ctx.given, f"{ctx.what} (backward)")
        nothing = grads[-1].new_zeros(()).expand(ctx.anchor)
        return (None, None, None, None, nothing, *(x for each in returned for x in each))


class Tie(torch.autograd.Function):
    """`tie` with gradients."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, *others: Tensor) -> Tensor:
        """The tensor itself."""
        ctx.shapes = [(x.shape, x.dtype) for x in others]
        return tensor.view_as(tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        """The gradient of the tensor, and zeros that take no memory."""
        return grad, *(grad.new_zeros((), dtype=dtype).expand(shape) for shape, dtype in ctx.shapes)


def tie(tensor: Tensor, *others: Tensor) -> Tensor:
    """`tensor`, through which the backward pass also reaches `others`, with gradients of zero.

    A rank enters the backward pass of every exchange that made one of `others`, also if no number of it was used here.
    """
    return Tie.apply(tensor, *others) if needs_gradient(tensor, *others) else tensor


def swap(
    group: Any, given: Sequence[Sequence[Tensor]], taken: Sequence[Sequence[Spec]], anchor: Tensor, *, what: str
) -> tuple[list[list[Tensor]], Tensor]:
    """One all-to-all of lists of tensors of any shapes and dtypes; differentiable.

    Args:
        group: the ranks.
        given: for each rank, the tensors to send to it.
        taken: for each rank, the (shape, dtype) of every tensor that it sends here. Both sides know them, so no sizes
            are sent.
        anchor: a tensor that requires a gradient on every rank or on none, whatever is sent.
        what: name of the exchange in `Traffic`.

    Returns:
        for each rank, the tensors that it sent; and an empty tensor that a rank has to `tie` to its result.
    """
    if not needs_gradient(anchor):
        return exchange(group, given, taken, what), anchor.new_empty(0)
    counts = [len(tensors) for tensors in given]
    *flat, token = Swap.apply(group, what, counts, taken, anchor, *(x for tensors in given for x in tensors))
    return per_rank(flat, [len(specs) for specs in taken]), token


def anchor_of(*tensors: Tensor) -> Tensor:
    """The first tensor that requires a gradient, else the first one: the `anchor` of an exchange of these tensors."""
    return next((x for x in tensors if x.requires_grad), tensors[0])


def exchange(
    group: Any, given: Sequence[Sequence[Tensor]], taken: Sequence[Sequence[Spec]], what: str
) -> list[list[Tensor]]:
    """`swap` without gradients: one message for each rank."""
    return start_exchange(group, given, taken, what)()


def start_exchange(
    group: Any, given: Sequence[Sequence[Tensor]], taken: Sequence[Sequence[Spec]], what: str
) -> Callable[[], list[list[Tensor]]]:
    """`exchange` in two steps: the function that is returned waits."""
    messages = [packed(tensors, group.device) for tensors in given]
    sizes = [[sum(num_bytes(*each) for each in tensors)] for tensors in taken]
    wait = group.start_all_to_all(messages, sizes, what=what)
    return lambda: [unpacked(message, tensors) for message, tensors in zip(wait(), taken, strict=True)]


def packed(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """The bytes of all tensors in one flat uint8 tensor; an empty one on `device` if there are none."""
    if not tensors:
        return torch.empty(0, dtype=torch.uint8, device=device)
    return torch.cat([to_bytes(x) for x in tensors])


def unpacked(message: Tensor, expected: Sequence[Spec]) -> list[Tensor]:
    """The inverse of `packed`, for tensors of the `expected` (shape, dtype)."""
    parts = message.split([num_bytes(*each) for each in expected])
    return [from_bytes(part, dtype, shape) for part, (shape, dtype) in zip(parts, expected, strict=True)]


def per_rank(flat: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """The items of a flat list in one list for each rank."""
    items = iter(flat)
    return [[next(items) for _ in range(count)] for count in counts]


def added(tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors of one shape, added up in float32 (float64 for float64), in their dtype."""
    wide = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    total = tensors[0].to(wide, copy=True)
    for tensor in tensors[1:]:
        total += tensor
    return total.to(tensors[0].dtype)
