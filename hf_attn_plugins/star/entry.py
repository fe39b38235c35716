"""Star Attention in one forward: the plan of every row of the batch, computed in few kernel calls.

A prompt of n blocks takes three calls, whatever n is: the first block, all later whole blocks as one batch, each over
the anchor's keys and its own, and the query over everything; a ragged last block adds a fourth. Work is proportional to
the attended pairs. The anchor's keys are those of the first block, nothing computes them again. They are copied before
each block's own keys, which saves a second pass over the rows: with so few keys, merging two partial results costs more
than the attention to the anchor itself (`windowed` has to do so). The compiled CPU kernels, for which a call costs
little, take the blocks in turns, so that these copies stay small. Where the Triton kernels run, a whole batch takes one
launch instead (`launched`), however its rows are padded, packed or windowed, and copies nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window
from hf_attn_plugins.core.partial import Partial, merge
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.bound_attend import Kernel
from hf_attn_plugins.star.batch_plans import masked, plans_of, prompts_of
from hf_attn_plugins.star.options import StarOptions
from hf_attn_plugins.star.plan import Plan, plan_for
from hf_attn_plugins.star.rectangles import pieces

ROWS_IN_TURN = 2048  # rows of the blocks that a compiled CPU kernel takes at once


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
    """Causal attention by the plan of `options`: star for a prompt into an empty cache, dense for whatever comes later.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), everything the cache returned.
        mask: a causal `Mask`. Blocks are counted from each row's first real token; windows, segments, predicates and
            biases are intersected with the plan. Padding rows give out 0 and lse -inf.
        scale, softcap, dropout: as in `kernels.attend`.
        options: block, anchor and query sizes; those that are None follow from each row's length.

    Raises:
        NotImplementedError: the mask has a prefix that every row sees: a bidirectional prefix would change the anchor's
            keys from block to block.

    Source: Star Attention, arXiv 2411.17116, with the anchor's keys reused (its hidden states are those of block 1).
    """
    kernel = Kernel(scale, softcap, dropout, options.kernel)
    rows, num_keys = query.shape[2], key.shape[2]
    unknown_start = torch.compiler.is_compiling() and isinstance(mask.offset, Tensor)
    if rows < 2 or (not unknown_start and mask.start(rows, num_keys) > 0):
        return kernel(query, key, value, mask=mask)
    if mask.prefix:
        raise NotImplementedError(
            f"star_attention got a bidirectional prefix of {mask.prefix} tokens, which has no causal anchor: "
            "use tiled_attention for this model."
        )

    def plan_of(length: int) -> Plan:
        return plan_for(length, options.block_size, options.anchor_size, options.query_size)

    if not unknown_start and mask.predicate is None and kernel.chosen_for(query, key, value, mask).name == "triton":
        plans = plans_of(mask, query.shape[0], rows, plan_of)
        if plans is not None:
            return launched(query, key[:, :, :rows], value[:, :, :rows], mask, plans, kernel)
    if mask.predicate is not None or mask.bias is not None or unknown_start:
        return kernel(query, key, value, mask=masked(mask, rows, options))
    if mask.key_padding is None and mask.query_segments is None:
        return prompt(query, key[:, :, :rows], value[:, :, :rows], plan_of(rows), mask.window, kernel)
    # Lengths cannot be read into a plan while a graph is traced.
    apart = None if torch.compiler.is_compiling() else ragged(query, key, value, mask, plan_of, kernel)
    return apart or kernel(query, key, value, mask=masked(mask, rows, options))


def launched(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, plans: list[list[tuple[int, Plan]]], kernel: Kernel
) -> Partial:
    """All prompts of a batch in one launch of the Triton kernels, forward, and one a gradient, backward."""
    mask = mask.over_keys(slice(0, query.shape[2])).replace(offset=0)
    if all(plan.is_dense for prompts in plans for _, plan in prompts):
        return kernel.named("triton")(query, key, value, mask=mask)
    cells = [[piece for first, plan in prompts for piece in pieces(plan, first)] for prompts in plans]
    return attend_rectangles(
        query, key, value, cells, mask=mask, scale=kernel.scale, softcap=kernel.softcap, dropout=kernel.dropout,
        kernel="triton",
    )  # fmt: skip


def prompt(query: Tensor, key: Tensor, value: Tensor, plan: Plan, window: Window, kernel: Kernel) -> Partial:
    """Rows that all follow one plan over keys of the same tokens; `window` bounds each of them as well."""
    causal = Mask(causal=True, window=window)
    if plan.is_dense:
        return kernel(query, key, value, mask=causal)
    kernel = kernel.chosen_for(query, key, value, causal)
    binds = window[0] is not None and window[0] < plan.length - 1

    def parts() -> Iterator[Partial]:
        yield from (windowed if binds else blocks)(query, key, value, plan, causal, kernel)
        if plan.query:
            yield kernel(query[:, :, plan.context :], key, value, mask=causal)

    return collected(parts(), query, value)


def blocks(query: Tensor, key: Tensor, value: Tensor, plan: Plan, causal: Mask, kernel: Kernel) -> Iterator[Partial]:
    """The context's rows: the first block, the later whole ones, the ragged one."""
    size, anchor, context = plan.block_size, plan.anchor_size, plan.context
    whole = context // size * size

    def block_keys(tensor: Tensor, first: int, end: int) -> Tensor:
        own = batched(tensor[:, :, first:end], size)
        if not anchor:
            return own
        count = len(own) // len(tensor)
        shared = tensor[:, None, :, :anchor].expand(-1, count, -1, -1, -1).flatten(0, 1)
        return torch.cat([shared, own], 2)

    def ragged_keys(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[:, :, :anchor], tensor[:, :, whole:context]], 2)

    yield kernel(query[:, :, :size], key[:, :, :size], value[:, :, :size], mask=causal)
    turn = max(1, ROWS_IN_TURN // size) * size if kernel.name == "cpu_fused" else max(size, whole)
    for first in range(size, whole, turn):
        end = min(first + turn, whole)
        rows = batched(query[:, :, first:end], size)
        later = kernel(rows, block_keys(key, first, end), block_keys(value, first, end), mask=causal)
        yield unbatched(later, len(query))
    if whole < context:
        yield kernel(query[:, :, whole:context], ragged_keys(key), ragged_keys(value), mask=causal)


def windowed(query: Tensor, key: Tensor, value: Tensor, plan: Plan, causal: Mask, kernel: Kernel) -> Iterator[Partial]:
    """The same under a window, for which the anchor has to stay at its true distance: two passes, merged."""
    size, anchor, context = plan.block_size, plan.anchor_size, plan.context
    whole = context // size * size
    q, k, v = (batched(x[:, :, :whole], size) for x in (query, key, value))
    own = [unbatched(kernel(q, k, v, mask=causal), len(query))]
    if whole < context:
        rest = slice(whole, context)
        own.append(kernel(query[:, :, rest], key[:, :, rest], value[:, :, rest], mask=causal))
    near = join(own)
    if not anchor:
        yield near
        return
    far = Mask(window=causal.window, offset=size)
    reached = kernel(query[:, :, size:context], key[:, :, :anchor], value[:, :, :anchor], mask=far)
    first, later = (Partial(near.out[:, :, rows], near.lse[:, :, rows]) for rows in (slice(size), slice(size, None)))
    yield first
    yield merge([later, reached])


def batched(tensor: Tensor, size: int) -> Tensor:
    """(B, H, n * size, D) as (B * n, H, size, D): blocks become rows of the batch, a view where B is 1."""
    return tensor.unflatten(2, (-1, size)).transpose(1, 2).flatten(0, 1)


def unbatched(part: Partial, batch: int) -> Partial:
    """The inverse of `batched` for a partial of `batch` prompts."""
    out, lse = (tensor.unflatten(0, (batch, -1)).transpose(1, 2).flatten(2, 3) for tensor in part)
    return Partial(out, lse)


def join(parts: list[Partial]) -> Partial:
    """Partials of consecutive rows as one."""
    if len(parts) == 1:
        return parts[0]
    return Partial(torch.cat([part.out for part in parts], 2), torch.cat([part.lse for part in parts], 2))


def collected(parts: Iterable[Partial], query: Tensor, value: Tensor) -> Partial:
    """`join` of parts that hold the rows of `query`; without gradients none of them outlives its turn."""
    if torch.is_grad_enabled():
        return join(list(parts))
    out, lse = whole = Partial.unfilled(query, value.shape[-1])
    first = 0
    for part in parts:
        end = first + part.lse.shape[2]
        out[:, :, first:end], lse[:, :, first:end] = part
        first = end
    return whole


def ragged(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, plan_of: Callable[[int], Plan], kernel: Kernel
) -> Partial | None:
    """A padded or packed batch: prompts of equal place and length together, each group by its own plan.

    Returns None where padding lies between real tokens, so that no prompt is a run of keys.
    """
    batch, rows = query.shape[0], query.shape[2]
    spans = prompts_of(mask, batch, rows)
    if spans is None:
        return None
    groups = defaultdict(list)
    for member, first, end in spans:
        groups[first, end].append(member)
    if list(groups) == [(0, rows)] and len(spans) == batch:
        return prompt(query, key[:, :, :rows], value[:, :, :rows], plan_of(rows), mask.window, kernel)
    out, lse = Partial.empty(query, value.shape[-1])
    for (first, end), members in groups.items():
        index = torch.tensor(members, device=query.device)
        own_query, own_key, own_value = (x[:, :, first:end].index_select(0, index) for x in (query, key, value))
        part = prompt(own_query, own_key, own_value, plan_of(end - first), mask.window, kernel)
        out[index, :, first:end], lse[index, :, first:end] = part
    return Partial(out, lse)
