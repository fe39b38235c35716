"""Star Attention in one forward: which function computes which rows.

| the call | function | kernel calls |
|---|---|---|
| one row, or rows after cached keys (decoding, a second turn) | `dense` | 1 |
| rows after cached keys that go on with a context (`star.encode` with dense heads) | `context_rows` | a plan |
| a kernel that takes a plan in one launch, no predicate | `one_launch` | 1 |
| dropout, no predicate | `one_launch` | 1, or one per rectangle |
| a layer with dense heads otherwise | `by_heads` | 1, and those of a row below |
| a mask with a predicate or a bias, or an offset that a traced graph cannot read | `as_predicate` | 1 |
| rows that all follow one plan | `single_plan` | 3 to 5, whatever the number of blocks |
| a padded or packed batch whose prompts are runs of tokens | `grouped_rows` | 3 to 5 per group of equal prompts |
| any other mask: padding between real tokens, lengths in a traced graph | `as_predicate` | 1 |

Work is proportional to the attended pairs everywhere but in `as_predicate`. The anchor's keys are those of the first
block and are computed once. `single_plan` calls the kernel for the first blocks, which see everything before them, for
all later whole blocks as one batch (`attend_blocks`), for a ragged last block if there is one, and for the query over
every key. A block's keys are a copy of the anchor's and its own (`blocks`). Under a halo its keys are a view of one
run, and under a window a copied anchor would stand too near: then the anchor is a call of its own (`near_and_far`).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.kernels.attend_blocks import attend_blocks
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.bound_attend import BoundAttend
from hf_attn_plugins.star.batch_plans import masked, plans_of, prompts_of
from hf_attn_plugins.star.context_rows import context_rows, is_context
from hf_attn_plugins.star.dense_heads import by_heads, check_heads, folded, repeated, unfolded
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import Plan
from hf_attn_plugins.star.rectangles import rectangles_of, whole_of


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
    options: StarOptions,
) -> Partial:
    """Causal attention by the plan of `options`: star for a prompt into an empty cache, dense for later tokens.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), everything the cache returned.
        mask: a causal `Mask`. Blocks are counted from each row's first real token; windows, segments, predicates and
            biases are intersected with the plan. Padding rows give out 0 and lse -inf.
        scale, softcap, dropout: as in `kernels.attend`.
        options: sizes, those that are None follow from each row's length, and this layer's dense heads
            (`StarOptions.for_layer`).

    Raises:
        NotImplementedError: the mask has a prefix that every row sees: a bidirectional prefix would change the anchor's
            keys from block to block.
        ValueError: a dense head that this layer does not have.

    Source: Star Attention, arXiv 2411.17116, with the anchor's keys reused (its hidden states are those of block 1).
    """
    kernel = BoundAttend(scale, softcap, dropout, options.kernel)
    rows, num_keys = query.shape[2], key.shape[2]
    unknown_start = torch.compiler.is_compiling() and isinstance(mask.offset, Tensor)
    start = None if unknown_start else mask.start(rows, num_keys)
    if is_context(start):
        rest = functools.partial(context_rows, plan=options.plan_of(num_keys), kernel=kernel)
        return by_heads(query, key, value, mask, options.layer_heads, full=kernel, rest=rest)
    if rows < 2 or (start or 0) > 0:
        return dense(query, key, value, mask, kernel)
    if mask.prefix:
        raise NotImplementedError(
            f"star_attention got a bidirectional prefix of {mask.prefix} tokens, which has no causal anchor: "
            "use tiled_attention for this model."
        )

    mask = mask.dropping(dropout, query, key)
    heads, kv_heads = options.layer_heads, key.shape[1]
    check_heads(heads, kv_heads)
    if len(heads) == kv_heads:
        return dense(query, key, value, mask, kernel)
    # Under dropout the plan keeps the places of the weights: the batches of `single_plan` would drop other ones.
    if not unknown_start and mask.predicate is None and (dropout or kernel.takes_rectangles(query, key, value, mask)):
        plans = plans_of(mask, query.shape[0], rows, options.plan_of)
        if plans is not None and not (heads and mask.bias is not None):
            return one_launch(query, key[:, :, :rows], value[:, :, :rows], mask, plans, heads, kernel)
    if heads:
        rest = functools.partial(attention, scale=scale, softcap=softcap, dropout=dropout, options=options.all_sparse())
        return by_heads(query, key, value, mask, heads, full=kernel, rest=rest)
    if mask.predicate is not None or mask.bias is not None or unknown_start:
        return as_predicate(query, key, value, mask, kernel, options)
    if mask.key_padding is None and mask.query_segments is None:
        return single_plan(query, key[:, :, :rows], value[:, :, :rows], options.plan_of(rows), mask.window, kernel)
    # A traced graph cannot read lengths from tensors.
    prompts = None if torch.compiler.is_compiling() else prompts_of(mask, query.shape[0], rows)
    if prompts is None:
        return as_predicate(query, key, value, mask, kernel, options)
    return grouped_rows(query, key[:, :, :rows], value[:, :, :rows], mask.window, prompts, options.plan_of, kernel)


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Mask, kernel: BoundAttend) -> Partial:
    """Every row over every key that the mask allows."""
    return kernel(query, key, value, mask=mask)


def as_predicate(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, kernel: BoundAttend, options: StarOptions
) -> Partial:
    """The plan as a mask function: right for every mask, but the kernel visits every tile."""
    return kernel(query, key, value, mask=masked(mask, query.shape[2], options, query.device))


def one_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    plans: list[list[tuple[int, Plan]]],
    heads: tuple[int, ...],
    kernel: BoundAttend,
) -> Partial:
    """All prompts of a batch as rectangles: one launch forward, one per gradient backward; no keys are copied.

    A plan belongs to a row of the batch. So where heads differ, every key head becomes a row of the batch.
    """
    mask = mask.over_keys(slice(0, query.shape[2])).replace(offset=0)
    if all(plan.is_dense for prompts in plans for _, plan in prompts):
        return kernel(query, key, value, mask=mask)
    rectangles = [[part for first, plan in prompts for part in rectangles_of(plan, first)] for prompts in plans]
    if not heads:
        return attend_rectangles(query, key, value, rectangles, mask=mask, **kernel.options)
    whole = [[part for first, plan in prompts for part in whole_of(plan, first)] for prompts in plans]
    batch, kv_heads = key.shape[:2]
    by_head = [(whole if head in heads else rectangles)[b] for b in range(len(plans)) for head in range(kv_heads)]
    part = attend_rectangles(
        *folded(query, key, value), by_head * (batch // len(plans)), mask=repeated(mask, kv_heads), **kernel.options
    )
    return unfolded(part, batch)


def single_plan(query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: Window, kernel: BoundAttend) -> Partial:
    """Rows that all follow one plan over the keys of the same tokens; `window` bounds every row as well."""
    causal = Mask(causal=True, window=window)
    if plan.is_dense:
        return dense(query, key, value, causal, kernel)
    kernel = kernel.with_kernel_for(query, key, value, causal)
    window_binds = window[0] is not None and window[0] < plan.length - 1

    def parts() -> Iterator[Partial]:
        end = plan.dense_end
        yield kernel(query[:, :, :end], key[:, :, :end], value[:, :, :end], mask=causal)
        yield from (near_and_far if window_binds or plan.halo_size else blocks)(query, key, value, plan, causal, kernel)
        if plan.query:
            yield kernel(query[:, :, plan.context :], key, value, mask=causal)

    return collected(parts(), query, value)


def blocks(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, causal: Mask, kernel: BoundAttend
) -> Iterator[Partial]:
    """The context's later rows: whole blocks, then the ragged one, each over a copy of the anchor and its own keys."""
    size, anchor, context = plan.block_size, plan.anchor_size, plan.context
    whole = context // size * size

    def ragged_keys(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :, :anchor], tensor[:, :, whole:context]], 2)

    yield from attend_blocks(kernel, query, key, value, causal, range(plan.dense_end, whole), size, shared=anchor)
    if whole < context:
        yield kernel(query[:, :, whole:context], ragged_keys(key), ragged_keys(value), mask=causal)


def near_and_far(
    query: Tensor, key: Tensor, value: Tensor, plan: Plan, causal: Mask, kernel: BoundAttend
) -> Iterator[Partial]:
    """The same rows, each over the keys from its halo on and, in a second call, over the anchor at its distance."""
    size, halo, anchor, context = plan.block_size, plan.halo_size, plan.anchor_size, plan.context
    first, whole = plan.dense_end, context // plan.block_size * plan.block_size
    own = list(attend_blocks(kernel, query, key, value, causal, range(first, whole), size, before=halo))
    if whole < context:
        keys = slice(whole - halo, context)
        own.append(kernel(query[:, :, whole:context], key[:, :, keys], value[:, :, keys], mask=causal))
    near = Partial.cat(own)
    if not anchor:
        yield near
        return
    far = Mask(window=causal.window, offset=first)
    yield merge([near, kernel(query[:, :, first:context], key[:, :, :anchor], value[:, :, :anchor], mask=far)])


def collected(parts: Iterable[Partial], query: Tensor, value: Tensor) -> Partial:
    """`Partial.cat` of parts that hold the rows of `query`; without gradients each part is freed once it is copied."""
    if torch.is_grad_enabled():
        return Partial.cat(list(parts))
    out, lse = whole = Partial.unfilled(query, value.shape[-1])
    first = 0
    for part in parts:
        end = first + part.lse.shape[2]
        out[:, :, first:end], lse[:, :, first:end] = part
        first = end
    return whole


def grouped_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window,
    prompts: list[tuple[int, int, int]],
    plan_of: Callable[[int], Plan],
    kernel: BoundAttend,
) -> Partial:
    """A padded or packed batch: prompts (row of the batch, first, end) of one place and length share a plan's calls."""
    batch, rows = query.shape[0], query.shape[2]
    groups = defaultdict(list)
    for member, first, end in prompts:
        groups[first, end].append(member)
    if list(groups) == [(0, rows)] and len(prompts) == batch:
        return single_plan(query, key, value, plan_of(rows), window, kernel)
    out, lse = Partial.empty(query, value.shape[-1])
    for (first, end), members in groups.items():
        index = torch.tensor(members, device=query.device)
        own_query, own_key, own_value = (x[:, :, first:end].index_select(0, index) for x in (query, key, value))
        part = single_plan(own_query, own_key, own_value, plan_of(end - first), window, kernel)
        out[index, :, first:end], lse[index, :, first:end] = part
    return Partial(out, lse)
