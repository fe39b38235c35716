"""What exchanges cost, counted: bytes of a merge, of an anchor, of gathered keys; and which anchor is cheaper."""

from __future__ import annotations

from dataclasses import dataclass

from hf_attn_plugins.star.cost import Shape


def merge_bytes(heads: int, head_dim: int, out_bytes: int = 2, lse_bytes: int = 4) -> int:
    """Bytes of (out, lse) of one token in one layer, from each rank to each other one.

    Args:
        heads: query heads; head_dim: of the values.
        out_bytes: of one number of the model's dtype; lse_bytes: 4, or 8 in float64.

    Example: `merge_bytes(32, 128)` is 8320, Llama-3.1-8B in bfloat16.
    """
    return heads * (head_dim * out_bytes + lse_bytes)


def keys_bytes(kv_heads: int, head_dim: int, number_bytes: int = 2) -> int:
    """Bytes of keys and values of one token in one layer: of the anchor, or of what dense prefill gathers.

    Example: `keys_bytes(8, 128)` is 4096, Llama-3.1-8B in bfloat16.
    """
    return 2 * kv_heads * head_dim * number_bytes


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


def cheaper_anchor(shape: Shape, anchor: int, ranks: int, wire: Wire) -> str:
    """Whether a rank gets an anchor of so many tokens sooner by "recompute" or by "broadcast".

    Recomputing costs the whole model on `anchor` tokens, on all ranks at once; a broadcast costs its keys in every
    layer, handed on in a tree. Neither changes a number of the result.
    """
    again = (shape.linear_flops(anchor) + shape.attention_flops(anchor * (anchor + 1) // 2, anchor)) / wire.flops
    hops = max(1, (ranks - 1).bit_length())
    told = hops * (shape.layers * wire.latency + shape.cache_bytes(anchor) / wire.bandwidth)
    return "recompute" if again <= told else "broadcast"
