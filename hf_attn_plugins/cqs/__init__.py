"""CQS attention: exact attention by independent workers, for any number of workers and any length.

`plan` (the Scheduler) divides all pairs of positions among workers by cyclic quorum sets, `work` (a Worker) computes
one share, `Tiler` merges the shares; `attention` does all three. Source: IEEE Access 13 (2025) 35527.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_attn_plugins.core.lazy import lazy
from hf_attn_plugins.cqs.planning.difference_covers import interest_set
from hf_attn_plugins.cqs.planning.scheduler import Plan, plan
from hf_attn_plugins.cqs.planning.worker_share import Leaf, Piece

if TYPE_CHECKING:
    from hf_attn_plugins.cqs.run_plan import attention
    from hf_attn_plugins.cqs.tiler import Tiler
    from hf_attn_plugins.cqs.workers import work

__all__ = ["Leaf", "Piece", "Plan", "Tiler", "attention", "interest_set", "plan", "work"]

# What needs PyTorch is imported on first use: planning does not.
_WITH_TORCH = {"attention": "run_plan", "Tiler": "tiler", "work": "workers"}
__getattr__, __dir__ = lazy(__name__, {name: f"{__name__}.{module}:{name}" for name, module in _WITH_TORCH.items()})
