"""Attention over several devices: who holds which keys, what is exchanged, and the merge across ranks.

`comm.group.Group` exchanges tensors, `partition` divides tokens among ranks, `comm.traffic` counts bytes.
`hap.context_parallel` (`hf.context_parallel`) runs a model over them.
"""

from __future__ import annotations

from hf_attn_plugins.parallel.comm.group import Group, RankError
from hf_attn_plugins.parallel.comm.traffic import Traffic

__all__ = ["Group", "RankError", "Traffic"]
