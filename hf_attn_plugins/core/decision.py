"""What one attention call does, decided once: `check` predicts and `trace` reports from the same record."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from hf_attn_plugins.core.mask import Mask


@dataclass(frozen=True, eq=False)
class CallFacts:
    """What a method's plan depends on.

    Attributes:
        rows, keys, batch: T, S and B of the call.
        start: position of row 0 on the key axis, None where it is not known (a traced static cache).
        mask: what restricts the pairs, its offset included.
        traced: whether a graph is being traced, so that tensors cannot be read.
        kv_heads: key heads of the call, 0 where they are not known.
    """

    rows: int
    keys: int
    batch: int
    start: int | None
    mask: Mask
    traced: bool = False
    kv_heads: int = 0


@dataclass(frozen=True)
class Decision:
    """One attention call.

    Attributes:
        method: what ran: "star", "cqs", "tiled" or another plugin's short name where its plan ran; "dense" where an
            approximate plugin saw everything; "decode" for a single row.
        reason: why the plugin's plan did not run; empty where it did.
        plan: sizes of the plan, such as {"blocks": 4, "block_size": 512}.
        attended, causal: (query, key) pairs of the prompt that were attended, and that dense causal attention has;
            both 0 where the call was not a causal prompt. Where heads differ, the mean over heads.
        plugin, layer, rows, keys, batch: the call.
        mask: what the mask was recognised as; empty where it was not.
        is_causal: whether it was causal self-attention.
        kernel: name of the kernel that suits the whole call, where it is known.
        order: when the call was made, among all calls of this process.
    """

    method: str
    reason: str = ""
    plan: dict[str, int] = field(default_factory=dict)
    attended: int = 0
    causal: int = 0
    plugin: str = ""
    layer: int | None = None
    rows: int = 0
    keys: int = 0
    batch: int = 1
    mask: tuple[str, ...] = ()
    is_causal: bool = False
    kernel: str | None = None
    order: int = field(default=0, compare=False)

    def of_call(self, **facts: Any) -> Decision:
        """The decision of a plan, completed by the facts of its call."""
        return replace(self, **facts)

    def text(self) -> str:
        """One line: "star: 4 blocks, block_size 512, anchor_size 128" or "dense: 1024 tokens, below 2048"."""
        sizes = ", ".join(f"{name} {size}" for name, size in self.plan.items())
        return ": ".join(part for part in (self.method, "; ".join(p for p in (sizes, self.reason) if p)) if part)


def later_rows(call: CallFacts) -> Decision | None:
    """The decision of rows that come once a cache is filled: the same for every method; None for a prompt's rows."""
    if call.rows > 1 and (call.start is None or call.start <= 0):
        return None
    if call.rows == 1:
        return Decision("decode")
    return Decision("dense", f"{call.rows} tokens behind {call.start} in the cache: a later turn sees everything")


def causal_pairs(lengths: list[int]) -> int:
    """Pairs that dense causal attention attends in prompts of these lengths."""
    return sum(n * (n + 1) // 2 for n in lengths)
