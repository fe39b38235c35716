"""Star Attention, arXiv 2411.17116: blocks and an anchor for the context, everything for the query.

`entry.attention` is what `attn_implementation="star_attention"` runs; `encode` builds a cache once, to be asked many
times. This file is the front door: the modules behind it do not import it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_attn_plugins.core.lazy import lazy
from hf_attn_plugins.star.plan import Plan, plan_for

if TYPE_CHECKING:
    from hf_attn_plugins.star.hf.ask import ask
    from hf_attn_plugins.star.hf.cache import branch
    from hf_attn_plugins.star.hf.encode import append, encode, plan_of
    from hf_attn_plugins.star.hf.pipeline import split_prompts
    from hf_attn_plugins.star.hf.store import load, save

__all__ = ["Plan", "append", "ask", "branch", "encode", "load", "plan_for", "plan_of", "save", "split_prompts"]

_HF = {"ask": "ask", "branch": "cache", "append": "encode", "encode": "encode", "plan_of": "encode"}
_HF |= {"load": "store", "save": "store", "split_prompts": "pipeline"}
__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.hf.{module}:{name}" for name, module in _HF.items()})
