"""How fast ranks compute and exchange, in orders of magnitude, and which way to get an anchor is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_plugins.star.cost import ModelShape


@dataclass(frozen=True)
class Wire:
    """How fast a rank computes and is told things: orders of magnitude, to choose by, not to promise.

    Attributes:
        flops: per second, of the linear layers.
        bandwidth: bytes per second between two ranks.
        latency: seconds of one exchange, however short.
    """

    flops: float
    bandwidth: float
    latency: float

    @classmethod
    def of(cls, device: str, nodes: int) -> Wire:
        """Of a device type ("cuda", "cpu", ...) and a launch on this many nodes: datasheet figures, halved."""
        if device == "cpu":
            return cls(flops=1e11, bandwidth=1e9, latency=1e-4)
        return cls(flops=2e14, bandwidth=1e11 if nodes == 1 else 1e10, latency=3e-5)


def cheaper_anchor(shape: ModelShape, anchor: int, ranks: int, wire: Wire) -> str:
    """Whether a rank gets an anchor of so many tokens sooner by "recompute" or by "broadcast".

    Recomputing costs the whole model on `anchor` tokens, on all ranks at once; a broadcast costs its keys in every
    layer, handed on in a tree. Neither changes a number of the result.
    """
    again = (shape.linear_flops(anchor) + shape.attention_flops(anchor * (anchor + 1) // 2, anchor)) / wire.flops
    hops = max(1, (ranks - 1).bit_length())
    told = hops * (shape.layers * wire.latency + shape.cache_bytes(anchor) / wire.bandwidth)
    return "recompute" if again <= told else "broadcast"
