"""Layers some of whose key heads see everything: heads taken apart, or made rows of the batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial

Attention = Callable[[Tensor, Tensor, Tensor, Mask], Partial]


def check_heads(heads: tuple[int, ...], kv_heads: int) -> None:
    """Raise ValueError for a dense head that a layer with `kv_heads` key heads does not have."""
    if heads and heads[-1] >= kv_heads:
        raise ValueError(f"dense_heads names key head {heads[-1]}: this layer has heads 0 .. {kv_heads - 1}.")


def by_heads(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, heads: tuple[int, ...], *, full: Attention, rest: Attention
) -> Partial:
    """The key heads `heads` with their queries by `full`, the other heads by `rest`, put together in order.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv).
        heads: some of 0 .. Hkv - 1, none, or all.

    Raises:
        ValueError: a head that this layer does not have.
    """
    kv_heads = key.shape[1]
    check_heads(heads, kv_heads)
    if not heads or len(heads) == kv_heads:
        return (full if heads else rest)(query, key, value, mask)
    group = query.shape[1] // kv_heads
    others = [head for head in range(kv_heads) if head not in heads]

    def part(chosen: list[int], attend: Attention) -> Partial:
        index = torch.tensor(chosen, device=query.device)
        own = (_heads(query, index, group), key.index_select(1, index), value.index_select(1, index))
        return attend(*own, _mask_of_heads(mask, index, group))

    both = Partial.cat([part(list(heads), full), part(others, rest)], dim=1)
    order = [*heads, *others]
    back = torch.tensor([order.index(head) for head in range(kv_heads)], device=query.device)
    return Partial(*(_heads(tensor, back, group) for tensor in both))


def _heads(tensor: Tensor, index: Tensor, group: int) -> Tensor:
    """Of (B, Hkv * group, ...) the queries of some key heads."""
    return tensor.unflatten(1, (-1, group)).index_select(1, index).flatten(1, 2)


def _mask_of_heads(mask: Mask, index: Tensor, group: int) -> Mask:
    """The mask of some key heads' queries: a bias may differ from head to head."""
    bias = mask.bias
    if mask.drops is not None:
        mask = mask.replace(drops=mask.drops._replace(lanes=_heads(mask.drops.lanes, index, group)))
    if bias is None or bias.ndim < 3 or bias.shape[-3] == 1:
        return mask
    return mask.replace(bias=_heads(bias if bias.ndim == 4 else bias[None], index, group))


def folded(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every key head as a row of the batch: (B, Hq, T, D) as (B * Hkv, Hq / Hkv, T, D); a view where B is 1."""
    own = query.unflatten(1, (key.shape[1], -1)).flatten(0, 1)
    return own, key.flatten(0, 1).unsqueeze(1), value.flatten(0, 1).unsqueeze(1)


def unfolded(part: Partial, batch: int) -> Partial:
    """The inverse of `folded` for a result."""
    return Partial(*(tensor.unflatten(0, (batch, -1)).flatten(1, 2) for tensor in part))


def repeated(mask: Mask, times: int) -> Mask:
    """A mask without bias and predicate for `folded` tensors: every row of the batch `times` times."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or len(tensor) == 1 else tensor.repeat_interleave(times, 0)

    return mask.replace(
        key_padding=rows(mask.key_padding),
        query_segments=rows(mask.query_segments),
        key_segments=rows(mask.key_segments),
        drops=None if mask.drops is None else mask.drops.folded(times),
    )
