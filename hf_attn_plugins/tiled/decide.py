"""What `tiled_attention` does with a call; also for every plugin without a `decide` of its own."""

from __future__ import annotations

from typing import Any

from hf_attn_plugins.core.decision import CallFacts, Decision, causal_pairs


def decide(call: CallFacts, options: Any = None) -> Decision:
    """A single row is "decode"; everything else is "tiled". Pairs are counted for calls that start at position 0."""
    if call.rows == 1:
        return Decision("decode")
    if call.start is not None and call.start > 0:
        return Decision("tiled")
    causal = causal_pairs([call.rows] * call.batch)
    return Decision("tiled", "", {}, causal, causal)
