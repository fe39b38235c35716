"""What `cqs_attention` does with a call: a plan of workers, or one undivided call and the reason."""

from __future__ import annotations

import dataclasses

from hf_attn_plugins.core.decision import CallFacts, Decision, causal_pairs, later_rows
from hf_attn_plugins.cqs.options import CQSOptions
from hf_attn_plugins.cqs.planning.scheduler import default_workers


def decide(call: CallFacts, options: CQSOptions) -> Decision:
    """The decision for one call: prompts of `options.min_length` tokens and more are divided among workers."""
    later = later_rows(call)
    if later is not None:
        return later if later.method == "decode" else dataclasses.replace(later, method="tiled")
    causal = causal_pairs([call.rows] * call.batch)
    if call.rows < options.min_length:
        reason = f"{call.rows} tokens, below min_length {options.min_length}"
        return Decision("tiled", reason, {}, causal, causal)
    if options.workers is not None and call.rows < options.workers:
        return Decision("tiled", f"{call.rows} tokens, fewer than {options.workers} workers", {}, causal, causal)
    if call.mask.prefix or call.keys < call.rows:
        return Decision("tiled", "a mask with a prefix that every row sees", {}, causal, causal)
    return Decision("cqs", "", {"workers": options.workers or default_workers(call.rows)}, causal, causal)
