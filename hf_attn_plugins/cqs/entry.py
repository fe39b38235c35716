"""`cqs_attention` as Transformers calls it: prefill and training by a plan, everything else by tiles."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.cqs.options import CQSOptions
from hf_attn_plugins.cqs.run_plan import attention as by_plan
from hf_attn_plugins.cqs.scheduler import Plan, default_workers, plan
from hf_attn_plugins.kernels.attend import attend


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
    """Exact attention; see `kernels.attend`.

    The prefill of an empty cache, and training, are divided among workers from `options.min_length` tokens on.
    Decoding, later turns, shorter calls and calls with fewer tokens than workers run as tiled attention. A compiled
    graph holds the plan as one operator (`hf.planned_op`); a call that is traced without it runs as tiles.

    One device gains no speed from the division. It gains that each worker holds a part of the keys only, and can be run
    again by itself. A GPU holds all keys here, so it does the cells of all workers in one launch;
    `cqs.attention(..., memory_budget=...)` goes worker by worker there too.
    """
    rows, num_keys = query.shape[2], key.shape[2]
    compiling = torch.compiler.is_compiling()
    too_short = rows < max(options.min_length, options.workers or 1)  # a worker needs a token
    if compiling or too_short or not _is_prefill(mask, rows, num_keys):
        return attend(
            query, key, value, mask=mask, scale=scale, softcap=softcap, dropout=dropout, kernel=options.kernel
        )
    if num_keys > rows:  # a static cache hands over its whole buffer; what lies behind the rows is not filled yet
        mask, keys = mask.replace(offset=0).trimmed(rows, num_keys)
        key, value = key[:, :, keys], value[:, :, keys]
    division = _plan(rows, options.workers or default_workers(rows), options.interest_set)
    return by_plan(
        query,
        key,
        value,
        division,
        mask=mask.replace(causal=True, offset=None),
        scale=scale,
        softcap=softcap,
        dropout=dropout,
        kernel=options.kernel,
    )


def _is_prefill(mask: Mask, rows: int, num_keys: int) -> bool:
    return mask.causal and not mask.prefix and num_keys >= rows and mask.start(rows, num_keys) == 0


@functools.lru_cache(maxsize=64)
def _plan(num_tokens: int, workers: int, interest_set: tuple[int, ...] | None) -> Plan:
    return plan(num_tokens, workers, interest_set)
