"""The keys that a rank's Star rows see: those of its own slots, and those that other ranks send in every layer."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.parallel.star_parts import Reach, StarParts, overlap


def keys_of(key: Tensor, value: Tensor, parts: StarParts, reach: Reach, group: Group) -> tuple[Tensor, Tensor]:
    """Keys and values in the order anchor | halo | blocks | query; a halo ends where the blocks begin.

    Every rank of the group must call it. Where nothing is received, these are `key` and `value` themselves.

    Args:
        key, value: (B, Hkv, T, D) and (B, Hkv, T, Dv), one per slot of this rank's forward.
        parts, reach: this rank's slots, and what its heads see.
        group: the ranks.

    Returns:
        (B, Hkv, S, D) and (B, Hkv, S, Dv). S is T, with the longest halo of the batch and a broadcast anchor added.
    """
    received = [*_anchor(key, value, parts, group), *_halo(key, value, parts, reach, group)]
    if not received:
        return key, value
    start, head_dim = len(parts.anchor), key.shape[3]
    keys = [key[:, :, :start], *(both[..., :head_dim] for both in received), key[:, :, start:]]
    values = [value[:, :, :start], *(both[..., head_dim:] for both in received), value[:, :, start:]]
    return torch.cat(keys, 2), torch.cat(values, 2)


def _anchor(key: Tensor, value: Tensor, parts: StarParts, group: Group) -> list[Tensor]:
    """The anchor's keys and values (B, Hkv, a, D + Dv) from rank `parts.source`, if this rank has to receive them."""
    length = parts.longest_anchor
    if parts.source is None or not length:
        return []
    if group.rank == parts.source:
        group.broadcast(_both(key[:, :, :length], value[:, :, :length]), parts.source, what="anchor")
        return []
    room = key.new_empty(*key.shape[:2], length, key.shape[3] + value.shape[3])
    return [group.broadcast(room, parts.source, what="anchor")]


def _halo(key: Tensor, value: Tensor, parts: StarParts, reach: Reach, group: Group) -> list[Tensor]:
    """The halo's keys and values (B, Hkv, h, D + Dv), aligned to the right, if this rank has a halo.

    The exchange has one message for each pair of ranks: the keys that lie on the one and in the other's halo. Ranks
    whose halo lies on the rank before them receive one message.
    """
    if not reach.is_exchanged:
        return []

    def piece(other: int) -> Tensor:
        found = []
        for index, (row, halo) in enumerate(zip(parts.rows, reach.halos[other], strict=True)):
            tokens, shift = overlap(row.own, halo), parts.own.start - row.own.start
            slots = slice(tokens.start + shift, tokens.stop + shift)
            found.append(_both(key[index, :, slots], value[index, :, slots]))
        return torch.cat(found, 1)

    own_halos, heads, width = reach.halos[group.rank], key.shape[1], key.shape[3] + value.shape[3]
    counts = [[len(overlap(row.own, halo)) for row, halo in zip(rows, own_halos, strict=True)] for rows in parts.ranks]
    shapes = [(heads, sum(count), width) for count in counts]
    messages = group.all_to_all([piece(other) for other in range(group.size)], shapes, what="halo")
    if not reach.longest_halo:
        return []
    room = key.new_zeros(len(key), heads, reach.longest_halo, width)  # zeros: nobody sees them, and NaN would spread
    filled = [reach.longest_halo - len(halo) for halo in own_halos]
    for message, count in zip(messages, counts, strict=True):  # ranks in order have tokens in order
        for index, tokens in enumerate(message.split(count, 1)):
            room[index, :, filled[index] : filled[index] + count[index]] = tokens
            filled[index] += count[index]
    return [room]


def _both(key: Tensor, value: Tensor) -> Tensor:
    """Keys and values of some tokens in one tensor, so that one message has both."""
    return torch.cat([key, value], -1)
