"""Star Attention, arXiv 2411.17116: blocks and an anchor for the context, everything for the query.

`attention.attention` is what `attn_implementation="star_attention"` runs; `encode` builds a cache once, to be asked
many times.
"""

from __future__ import annotations

from hf_attn_plugins.star.ask import ask
from hf_attn_plugins.star.cache import branch
from hf_attn_plugins.star.encode import append, encode, plan_of
from hf_attn_plugins.star.plan import Plan, plan_for
from hf_attn_plugins.star.store import load, save

__all__ = ["Plan", "append", "ask", "branch", "encode", "load", "plan_for", "plan_of", "save"]
