"""The keys that a rank's Star rows see: those of its own slots, and those that other ranks send in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.parallel.comm.collectives import anchor_of, swap
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.star_parts import Reach, StarParts, overlap


def keys_of(
    key: Tensor, value: Tensor, parts: StarParts, reach: Reach, group: Group
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Keys and values in the order anchor | halo | blocks | query; a halo ends where the blocks begin.

    Every rank of the group must call it. Where nothing is received, these are `key` and `value` themselves.
    Differentiable.

    Args:
        key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), one per slot of this rank's forward.
        parts, reach: this rank's slots, and what its heads see.
        group: the ranks.

    Returns:
        (B, Hkv, S, D) and (B, Hkv, S, Dv). S is T, with the longest halo of the batch and a broadcast anchor added.
        Also the empty tensors that the caller has to `tie` to its result.
    """
    anchor, anchor_tokens = _anchor(key, value, parts, group)
    halo, halo_tokens = _halo(key, value, parts, reach, group)
    received, tokens = [*anchor, *halo], [*anchor_tokens, *halo_tokens]
    if not received:
        return key, value, tokens
    start, head_dim = len(parts.anchor), key.shape[3]
    keys = [key[:, :, :start], *(both[..., :head_dim] for both in received), key[:, :, start:]]
    values = [value[:, :, :start], *(both[..., head_dim:] for both in received), value[:, :, start:]]
    return torch.cat(keys, 2), torch.cat(values, 2), tokens


Received = tuple[list[Tensor], list[Tensor]]  # what this rank receives, and the empty tensors to tie to its result


def _anchor(key: Tensor, value: Tensor, parts: StarParts, group: Group) -> Received:
    """The anchor's keys and values (B, Hkv, a, D + Dv) from rank `parts.source`, if this rank has to receive them."""
    length, source = parts.longest_anchor, parts.source
    if source is None or not length or group.size == 1:
        return [], []
    is_source, shape = group.rank == source, (*key.shape[:2], length, key.shape[3] + value.shape[3])
    if needs_gradient(key, value):  # a broadcast has no backward
        own = [_both(key[:, :, :length], value[:, :, :length])] if is_source else []
        given = [own if rank != source else [] for rank in range(group.size)]
        taken = [[(shape, key.dtype)] if rank == source and not is_source else [] for rank in range(group.size)]
        arrived, token = swap(group, given, taken, anchor_of(key, value), what="anchor")
        return arrived[source], [token]
    if is_source:
        group.broadcast(_both(key[:, :, :length], value[:, :, :length]), source, what="anchor")
        return [], []
    return [group.broadcast(key.new_empty(shape), source, what="anchor")], []


def _halo(key: Tensor, value: Tensor, parts: StarParts, reach: Reach, group: Group) -> Received:
    """The halo's keys and values (B, Hkv, h, D + Dv), aligned to the right, if this rank has a halo.

    The exchange has one message for each pair of ranks: the keys that lie on the one and in the other's halo. Ranks
    whose halo lies on the rank before them receive one message.
    """
    if not reach.is_exchanged:
        return [], []

    def piece(other: int) -> Tensor:
        found = []
        for index, (row, halo) in enumerate(zip(parts.rows, reach.halos[other], strict=True)):
            tokens, shift = overlap(row.own, halo), parts.own.start - row.own.start
            slots = slice(tokens.start + shift, tokens.stop + shift)
            found.append(_both(key[index, :, slots], value[index, :, slots]))
        return torch.cat(found, 1)

    own_halos, heads, width = reach.halos[group.rank], key.shape[1], key.shape[3] + value.shape[3]
    counts = [[len(overlap(row.own, halo)) for row, halo in zip(rows, own_halos, strict=True)] for rows in parts.ranks]
    given = [[piece(other)] for other in range(group.size)]
    taken = [[((heads, sum(count), width), key.dtype)] for count in counts]
    arrived, token = swap(group, given, taken, anchor_of(key, value), what="halo")
    messages = [message for (message,) in arrived]
    if not reach.longest_halo:
        return [], [token]
    room = key.new_zeros(len(key), heads, reach.longest_halo, width)  # zeros: nobody sees them, and NaN would spread
    filled = [reach.longest_halo - len(halo) for halo in own_halos]
    for message, count in zip(messages, counts, strict=True):  # ranks in order have tokens in order
        for index, tokens in enumerate(message.split(count, 1)):
            room[index, :, filled[index] : filled[index] + count[index]] = tokens
            filled[index] += count[index]
    return [room], [token]


def _both(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values of some tokens in one tensor, so that one message has both."""
    return torch.cat([key, value], -1)
