"""CQS attention in one forward: which function computes which call.

| the call | function | kernel calls |
|---|---|---|
| decoding, a later turn, cross-attention, no causal mask, a bidirectional prefix | `undivided` | 1 |
| a prompt of fewer tokens than `min_length` or than workers | `undivided` | 1 |
| a call that torch.compile traces itself | `undivided` | 1 |
| any other prompt into an empty cache; training | `divided` | 1 where a kernel takes rectangles, else one per piece |

All of them are exact. In a compiled graph the call of a layer is one operator (`hf/calls/planned_op.py`), which runs
this file without tracing it; a call is traced only where that operator is not used.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.options import CQSOptions
from hf_attn_plugins.cqs.planning.scheduler import Plan, default_workers, plan
from hf_attn_plugins.cqs.run_plan import attention as by_plan
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.kernels.bound_attend import BoundAttend


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
    options: CQSOptions,
) -> Partial:
    """Exact attention, divided among workers for long prompts.

    One device gains no speed from the division. Each worker holds only a part of the keys, and can be run again by
    itself. `cqs.attention(..., memory_budget=...)` uses this to bound memory.

    Args:
        query: (B, Hq, T, D); key, value: (B, Hkv, S, D) and (B, Hkv, S, Dv), everything the cache returned.
        mask: which keys each row sees.
        scale, softcap, dropout: as in `kernels.attend`.
        options: number of workers, interest set, the shortest prompt to divide, and the kernel.

    Returns:
        `Partial`: out (B, Hq, T, Dv) in the query's dtype; lse (B, Hq, T) in float32 (float64 for float64).

    Raises:
        ValueError: tensors, mask or kernel do not fit; see `kernels.attend`.
        NotImplementedError: the kernel that `options` names cannot compute this call.

    Source: CQS-Attention, IEEE Access 13 (2025) 35527.
    """
    kernel = BoundAttend(scale, softcap, dropout, options.kernel)
    rows, num_keys = query.shape[2], key.shape[2]
    too_short = rows < max(options.min_length, options.workers or 1)  # a worker needs a token
    if torch.compiler.is_compiling() or too_short or not _is_prompt(mask, rows, num_keys):
        return undivided(query, key, value, mask, kernel)
    return divided(query, key, value, mask, kernel, options)


def undivided(query: Tensor, key: Tensor, value: Tensor, mask: Mask, kernel: BoundAttend) -> Partial:
    """All rows over all keys in one call of the kernel."""
    return attend(query, key, value, mask=mask, **kernel.options)


def divided(query: Tensor, key: Tensor, value: Tensor, mask: Mask, kernel: BoundAttend, options: CQSOptions) -> Partial:
    """The rows over the keys of the same tokens, by the plan of `options`."""
    rows, num_keys = query.shape[2], key.shape[2]
    if num_keys > rows:  # a static cache hands over its whole buffer; the places behind the rows are not filled yet
        mask, keys = mask.replace(offset=0).trimmed(rows, num_keys)
        key, value = key[:, :, keys], value[:, :, keys]
    division = _plan(rows, options.workers or default_workers(rows), options.interest_set)
    return by_plan(query, key, value, division, mask=mask.replace(causal=True, offset=None), **kernel.options)


def _is_prompt(mask: Mask, rows: int, num_keys: int) -> bool:
    return mask.causal and not mask.prefix and num_keys >= rows and mask.start(rows, num_keys) == 0


@functools.lru_cache(maxsize=64)
def _plan(num_tokens: int, workers: int, interest_set: tuple[int, ...] | None) -> Plan:
    return plan(num_tokens, workers, interest_set)
