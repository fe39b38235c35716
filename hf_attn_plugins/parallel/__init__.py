"""Attention over several devices: who holds which keys, what is exchanged, and the merge across ranks.

`group.Group` talks, `dealing` decides who gets what, `traffic` counts; `hap.context_parallel` puts a model on top.
"""

from __future__ import annotations

from hf_attn_plugins.parallel.comm.group import Group, RankError
from hf_attn_plugins.parallel.comm.traffic import Traffic

__all__ = ["Group", "RankError", "Traffic"]
