"""Rough speeds of a rank and of its connection, and two choices by them: Star's anchor, and which turns are dealt."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hf_attn_plugins.cqs.planning.cost import CallShape
from hf_attn_plugins.parallel.comm.group import Group
from hf_attn_plugins.star.cost import ModelShape


@dataclass(frozen=True)
class Wire:
    """Orders of magnitude of a rank's speed; they choose between two methods and predict no time.

    Attributes:
        flops: floating-point operations per second in the linear layers.
        bandwidth: bytes per second between two ranks.
        latency: seconds that one exchange takes in addition to its bytes.
    """

    flops: float
    bandwidth: float
    latency: float

    @classmethod
    def of(cls, device: str, nodes: int) -> Wire:
        """Half of the datasheet figures of a device type ("cuda", "cpu", ...) in a launch on `nodes` machines."""
        if device == "cpu":
            return cls(flops=1e11, bandwidth=1e9, latency=1e-4)
        return cls(flops=2e14, bandwidth=1e11 if nodes == 1 else 1e10, latency=3e-5)

    @classmethod
    def between(cls, group: Group) -> Wire:
        """The speeds of a group, the same on every rank; every rank must call it."""
        nodes = group.objects(-(-group.size // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", group.size)))))
        return cls.of(group.device.type, max(nodes))


def cheaper_anchor(shape: ModelShape, anchor: int, ranks: int, wire: Wire) -> str:
    """ "recompute" or "broadcast": whichever gives every rank the anchor's keys and values in less time.

    Recompute: every rank runs the whole model on the anchor. Broadcast: in every layer, rank 0 sends the anchor's keys
    and values along a tree of ceil(log2(ranks)) steps. The result of the model does not depend on the choice.

    Args:
        shape: sizes of the model.
        anchor: tokens of the anchor.
        ranks: number of ranks.
        wire: speeds of a rank and of its connection.
    """
    recompute_s = (shape.linear_flops(anchor) + shape.attention_flops(anchor * (anchor + 1) // 2, anchor)) / wire.flops
    hops = max(1, (ranks - 1).bit_length())
    broadcast_s = hops * (shape.layers * wire.latency + shape.cache_bytes(anchor) / wire.bandwidth)
    return "recompute" if recompute_s <= broadcast_s else "broadcast"


def least_turn_of(config: Mapping[str, Any], group: Group) -> int | None:
    """`least_turn` for a model's config and these ranks, the same on every rank; None for a config without sizes."""
    wire = Wire.between(group)
    try:
        shape = ModelShape.of(config)
    except ValueError:
        return None
    return least_turn(shape, group.size, wire)


def least_turn(shape: ModelShape, ranks: int, wire: Wire) -> int | None:
    """The tokens of a later turn, all batch rows together, from which on dealing it takes less time; None for one rank.

    Computed by each of R ranks, a turn passes all of its T tokens through every rank's projections and MLPs, and a rank
    receives (R - 1) T results in one exchange per layer. Dealt, T / R tokens pass through them, and a rank receives
    (R - 1) / R T queries and as many results in two exchanges per layer; one more exchange collects the hidden states.
    Attention costs the same both ways. So a token saves

        linear_flops(1) (1 - 1 / R) / flops + layers ((R - 1) result - (R - 1) / R (query + result)) / bandwidth

    seconds, and the turn costs (layers + 1) latency more. See `turns` for both ways.

    Args:
        shape: sizes of the model.
        ranks: R.
        wire: speeds of a rank and of its connection.
    """
    if ranks == 1:
        return None
    call = CallShape(shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim, shape.bytes_per_value)
    moved = (ranks - 1) * (call.result_bytes - (call.query_bytes + call.result_bytes) / ranks)
    saved_s = shape.linear_flops(1) * (1 - 1 / ranks) / wire.flops + shape.layers * moved / wire.bandwidth
    return max(ranks, math.ceil((shape.layers + 1) * wire.latency / saved_s))
