"""What `tiled_attention`, and every plugin without a `decide` of its own, does with a call."""

from __future__ import annotations

from typing import Any

from hf_attn_plugins.core.decision import CallFacts, Decision, causal_pairs


def decide(call: CallFacts, options: Any = None) -> Decision:
    """A prompt of any kind is "tiled", a single row "decode"; a later turn counts no pairs of the prompt."""
    if call.rows == 1:
        return Decision("decode")
    if call.start is not None and call.start > 0:
        return Decision("tiled")
    causal = causal_pairs([call.rows] * call.batch)
    return Decision("tiled", "", {}, causal, causal)
