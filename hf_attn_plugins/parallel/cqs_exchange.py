"""CQS attention over sharded tokens: owners send groups to workers, workers send partial results back to owners.

A round is one exchange `Gather`, the work of some workers, and one exchange `Return`. While groups are on their way, a
rank computes the pairs of groups that are both its own. The exchanges are autograd functions. Every rank runs them
backward too, also a rank that had nothing to send: all ranks must enter every exchange.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.cqs.planning.worker_share import Leaf, Range
from hf_attn_plugins.cqs.tokens import TOKENS, Parts, Tokens
from hf_attn_plugins.cqs.workers import work
from hf_attn_plugins.parallel.cqs_messages import CallPlan
from hf_attn_plugins.parallel.cqs_plan import RankPlan

if TYPE_CHECKING:
    from hf_attn_plugins.parallel.comm.group import Group


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: RankPlan,
    group: Group,
    *,
    mask: Mask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    kernel: str | None = None,
) -> Partial:
    """Exact self-attention of sharded tokens. Every rank calls it with its shard and gets the result of its shard.

    Differentiable in query, key and value, through out and lse. If one rank runs backward, all ranks must.

    Args:
        query: (B, Hq, n, D), the tokens in `plan.shards[group.rank]` of all N.
        key, value: (B, Hkv, n, D) and (B, Hkv, n, Dv).
        plan: made by `rank_plan` for N tokens and `group.size` ranks.
        mask: over all N x N positions; its tensors are the same on every rank; `causal` equals `plan.is_causal`.
        scale, softcap, dropout, kernel: as in `kernels.attend`.

    Returns:
        `Partial` of the shard's rows over all N keys.

    Raises:
        ValueError: a shard of another length than planned, a plan for another number of ranks, or a causal plan with a
            mask that is not causal.
        RankError: a rank is gone or does not answer.
    """
    mask = Mask(causal=plan.is_causal) if mask is None else mask
    _check(query, key, plan, group, mask)
    call = CallPlan(plan, group, query.shape, key.shape, value.shape, query.dtype)
    own = [_Own(x, call) for x in (query, key, value)]
    total: Partial | None = None

    def compute(
        leaves: Iterable[Leaf], into: dict[Range, list[Partial]], rows: Tokens, keys: Tokens, values: Tokens
    ) -> None:
        for leaf in leaves:
            if not leaf.keys(plan.is_causal):
                continue
            result = work(
                leaf, rows, keys, values, mask=mask, scale=scale, softcap=softcap, dropout=dropout, kernel=kernel
            )
            for span, partial in zip(result.rows, result.partials, strict=True):
                into[span].append(partial)

    for index in range(plan.num_rounds):
        needed = plan.rounds[index][group.rank]
        by_group: dict[Range, list[Partial]] = {span: [] for span in needed.rows}

        arriving = call.start_groups(index, query, key, value)
        # With gradients, two results per row would have to be kept for the backward pass.
        first = (lambda _: False) if torch.is_grad_enabled() else call.is_own
        halves = [leaf.split(first) for leaf in needed.leaves]
        present = [span for span in {*needed.rows, *needed.keys} if call.is_own(span)]
        compute((mine for mine, _ in halves), by_group, *(x.with_parts(present, []) for x in own))
        *parts, token = Gather.apply(call, index, arriving, query, key, value)
        rows, keys, values = (
            held.with_parts(wanted, [parts.pop(0) for _ in call.foreign(wanted)])
            for held, wanted in zip(own, (needed.rows, needed.keys, needed.keys))
        )
        compute((rest for _, rest in halves), by_group, rows, keys, values)
        head_dim_v = value.shape[-1]
        partials = [
            merge(parts) if parts else Partial.empty(rows.take((span,)), head_dim_v) for span, parts in by_group.items()
        ]
        out, lse = Return.apply(call, index, token, *(x for partial in partials for x in partial))
        # The running result stays in float32 between rounds and is rounded to the model's dtype once, at the end.
        total = Partial(out, lse) if total is None else merge([total, Partial(out, lse)])
    assert total is not None
    return Partial(total.out.to(query.dtype), total.lse)


class Gather(torch.autograd.Function):
    """Wait for groups of other ranks (`CallPlan.start_groups`); backward sends gradients to the owners and adds up.

    Returns the received groups (queries, then keys, then values), and an empty token. The token connects the exchange
    to the autograd graph of a rank that receives nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        call: CallPlan,
        index: int,
        arriving: Callable[[], list[list[Tensor]]],
        query: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.call, ctx.index = call, index
        taken, arrived = [call.taken(index, other) for other in range(call.group.size)], arriving()
        by_kind: list[list[Tensor]] = [[], [], []]
        for each, tensors_of_rank in zip(taken, arrived, strict=True):
            for (kind, _), tensor in zip(each, tensors_of_rank, strict=True):
                by_kind[kind].append(tensor)
        return (*(x for tensors in by_kind for x in tensors), query.new_empty(0))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        call, index = ctx.call, ctx.index
        ranks, shapes = range(call.group.size), (call.query, call.key, call.value)
        taken = [call.taken(index, other) for other in ranks]
        order = sorted((kind, span) for each in taken for kind, span in each)
        grad_of = dict(zip(order, grads[:-1], strict=True))
        given = [call.given(index, other) for other in ranks]
        arrived = call.swap(
            "cqs groups (backward)",
            [[grad_of[each] for each in wanted] for wanted in taken],
            [[(call.shape(shapes[k], span), call.dtype) for k, span in each] for each in given],
        )
        # Several ranks may return gradients of one group; they are added up in float32.
        sums = [torch.zeros(shape, dtype=call.wide, device=grads[-1].device) for shape in shapes]
        for each, tensors in zip(given, arrived, strict=True):
            for (kind, span), tensor in zip(each, tensors, strict=True):
                sums[kind][:, :, call.local(span)] += tensor
        return (None, None, None, *(total.to(call.dtype) for total in sums))


class Return(torch.autograd.Function):
    """Send partial results to the owners of their rows; the owner merges them and its own in float32.

    Takes `Gather`'s token, and out and lse of every group of rows in the round. Returns out and lse of the shard.

    Backward, for one partial result (out, lse) of rows with merged result O and merged lse L:
        w = exp(lse - L),  D = rowsum(dO * O) - dL,  d out = w dO,  d lse = w (rowsum(dO * out) - D).
    Only dO, L and D are sent, from the owner to the workers; no partial result is sent a second time.
    """

    @staticmethod
    def forward(ctx: Any, call: CallPlan, index: int, token: Tensor, *flat: Tensor) -> tuple[Tensor, Tensor]:
        rows = call.plan.rounds[index][call.group.rank].rows
        mine = dict(zip(rows, zip(flat[::2], flat[1::2], strict=True), strict=True))
        ranks = range(call.group.size)
        # The lse comes first: it has the larger element size, so that both lie aligned in the message.
        given = [
            [mine[span][which] for which in (1, 0) for span in call.plan.rows_moved(index, other, call.group.rank)]
            for other in ranks
        ]
        back = [call.plan.rows_moved(index, call.group.rank, other) for other in ranks]
        arrived = call.swap("cqs results", given, [_results(call, spans, (call.wide,)) for spans in back])
        pieces: dict[Range, list[Partial]] = {}
        for span in rows:
            if call.is_own(span):
                pieces[span] = [Partial(*mine[span])]
        for spans, tensors in zip(back, arrived, strict=True):
            for span, lse, out in zip(spans, tensors, tensors[len(spans) :]):
                pieces.setdefault(span, []).append(Partial(out, lse))
        out = token.new_zeros(call.out_shape(call.shard), dtype=call.wide)
        lse = out.new_full(out.shape[:-1], -torch.inf)
        for span, parts in pieces.items():
            rows_here = call.local(span)
            whole = merge([Partial(part.out.to(call.wide), part.lse) for part in parts])
            out[:, :, rows_here], lse[:, :, rows_here] = whole
        ctx.call, ctx.index = call, index
        ctx.save_for_backward(out, lse, *flat)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
        call, index = ctx.call, ctx.index
        out, lse, *flat = ctx.saved_tensors
        delta = (grad_out * out).sum(-1) - grad_lse
        ranks = range(call.group.size)
        upstream = (lse, delta, grad_out.to(call.dtype))
        back = [call.plan.rows_moved(index, call.group.rank, other) for other in ranks]
        given = [[x[:, :, call.local(span)] for x in upstream for span in spans] for spans in back]
        taken = [call.plan.rows_moved(index, other, call.group.rank) for other in ranks]
        arrived = call.swap(
            "cqs results (backward)", given, [_results(call, spans, (call.wide,) * 2) for spans in taken]
        )
        of: dict[Range, tuple[Tensor, ...]] = {}
        for spans, tensors in zip(taken, arrived, strict=True):
            of |= {span: tuple(tensors[i :: len(spans)]) for i, span in enumerate(spans)}
        grads: list[Tensor] = []
        for span, part_out, part_lse in zip(call.plan.rounds[index][call.group.rank].rows, flat[::2], flat[1::2]):
            rows_here = call.local(span)
            whole, shift, upward = of[span] if span in of else tuple(x[:, :, rows_here] for x in upstream)
            upward = upward.to(call.wide)
            # A row that sees no key has L = -inf; its weight is 0, not exp(-inf + inf) = NaN.
            weight = torch.where(whole == -torch.inf, 0, (part_lse - whole).exp())
            grads.append((weight.unsqueeze(-1) * upward).to(part_out.dtype))
            grads.append(weight * ((upward * part_out.to(upward.dtype)).sum(-1) - shift))
        return (None, None, grad_out.new_zeros(0, dtype=call.dtype), *grads)


class _Own:
    """A tensor of this rank's shard, joined in every round with the groups received from other ranks."""

    def __init__(self, tensor: Tensor, call: CallPlan) -> None:
        self._tensor, self._call = tensor, call

    def with_parts(self, wanted: Sequence[Range], foreign: Sequence[Tensor]) -> Parts:
        arriving = iter(foreign)
        call = self._call
        parts = [self._tensor[:, :, call.local(s)] if call.is_own(s) else next(arriving) for s in wanted]
        return Parts(dict(zip(wanted, parts, strict=True)))


def _check(query: Tensor, key: Tensor, plan: RankPlan, group: Group, mask: Mask) -> None:
    if plan.num_ranks != group.size:
        raise ValueError(
            f"the plan is for {plan.num_ranks} ranks, there are {group.size}: make it with num_ranks={group.size}."
        )
    begin, end = plan.shards[group.rank]
    if not query.shape[TOKENS] == key.shape[TOKENS] == end - begin:
        raise ValueError(
            f"rank {group.rank} owns tokens {begin} .. {end} of {plan.num_tokens}, got {query.shape[TOKENS]} queries "
            f"and {key.shape[TOKENS]} keys."
        )
    if plan.is_causal and not (mask.causal and not mask.prefix):
        raise ValueError("the plan is for causal attention and the mask is not: make it with is_causal=False.")
    if mask.start(plan.num_tokens, plan.num_tokens) != 0:
        raise ValueError(f"mask.offset={mask.offset}: in self-attention row 0 stands at position 0.")


def _results(
    call: CallPlan, spans: Sequence[Range], firsts: Sequence[torch.dtype]
) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, dtype) of each tensor about rows: an element per row for each dtype in `firsts`, then out or d out."""
    numbers = [(call.out_shape(span)[:-1], dtype) for dtype in firsts for span in spans]
    return numbers + [(call.out_shape(span), call.dtype) for span in spans]
