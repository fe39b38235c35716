"""Rough speeds of a rank and of its connection, and from them whether to recompute or to broadcast Star's anchor."""

from __future__ import annotations

from dataclasses import dataclass

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
