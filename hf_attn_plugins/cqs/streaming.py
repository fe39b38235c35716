"""Bounded memory: workers run one after another within a budget of bytes; inputs and results may lie in files."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import hf_attn_plugins.cqs.planning.cost as cost
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, lse_dtype, merge, with_sinks
from hf_attn_plugins.cqs.planning.scheduler import Plan
from hf_attn_plugins.cqs.storage import Source, file_tensor
from hf_attn_plugins.cqs.sub_masks import check_lengths
from hf_attn_plugins.cqs.tiler import Ledger
from hf_attn_plugins.cqs.tokens import TOKENS
from hf_attn_plugins.cqs.workers import work
from hf_attn_plugins.kernels.choose import only_pytorch_runs

OPERATOR_WORKSPACE = 8 * 2**20  # bytes that PyTorch's operators allocate, besides `PER_THREAD` for each thread
PER_THREAD = 2**20


def stream(
    query: Any,
    key: Any,
    value: Any,
    plan: Plan | None,
    *,
    budget: int,
    mask: Mask,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Partial:
    """`run_plan.attention` with a `memory_budget`, here `budget` in bytes.

    Results are merged in place, block of rows by block of rows, in float32 (float64 for float64).

    Raises:
        ValueError: the plan or every plan needs more than the budget, or an argument does not fit; see
            `run_plan.attention`.
    """
    sources = [Source(x) for x in (query, key, value)]
    shape, dtype = _shape(*sources), sources[0].dtype
    num_tokens = sources[0].shape[TOKENS]
    workspace = workspace_bytes(dtype, mask, softcap, dropout, kernel)
    plan = plan or cost.choose(num_tokens, shape, budget, workspace)
    check_lengths(num_tokens, sources[1].shape[TOKENS], plan, mask)
    peak = cost.streaming_peak(plan, shape, workspace)
    if peak > budget:
        raise ValueError(
            f"this plan needs up to {cost.format_bytes(peak)}, more than the budget of {cost.format_bytes(budget)}: "
            "raise the budget, or leave the plan out and one that fits is chosen."
        )
    device = torch.device(device) if device is not None else None
    mask = mask if device is None else _moved(mask, device)
    wide = lse_dtype(dtype)
    out_device = query.device if isinstance(query, Tensor) else torch.device("cpu")
    in_files = any(source.in_file for source in sources)
    rows_shape = (*sources[0].shape[:3], shape.head_dim_v)
    if out is None and in_files:
        out = file_tensor(rows_shape, dtype, folder)
    elif out is None:
        out = torch.zeros(rows_shape, dtype=dtype, device=out_device)
    elif tuple(out.shape) != rows_shape or out.dtype != dtype:
        raise ValueError(f"out must be {rows_shape} of {dtype}, got {tuple(out.shape)} of {out.dtype}.")
    total = out.zero_() if dtype == wide else file_tensor(rows_shape, wide, folder)
    merged = Partial(total, torch.full(rows_shape[:3], -torch.inf, dtype=wide, device=total.device))
    sinks = None if sinks is None else sinks.to(total.device)
    block = max(1, cost.MERGE_BLOCK // max(1, shape.accumulated_bytes))
    leaves = list(plan.leaves())
    ledger = Ledger(leaves)
    with torch.no_grad():
        for leaf in leaves:
            keys, values = (source.read(leaf.ranges, device) for source in sources[1:])
            for rows in leaf.ranges:
                queries = sources[0].read((rows,), device)
                result = work(
                    leaf,
                    queries,
                    keys,
                    values,
                    mask=mask,
                    scale=scale,
                    softcap=softcap,
                    dropout=dropout,
                    kernel=kernel,
                    only=rows,
                )
                for (begin, end), partial in zip(result.rows, result.partials, strict=True):
                    for first in range(begin, end, block):
                        last = min(end, first + block)
                        _merge_into(merged.rows(first, last), partial.rows(first - begin, last - begin))
                del queries, result
            ledger.admit(leaf.path)
            del keys, values
        ledger.require_all()
        results = Partial(out, merged.lse.to(out.device))
        for first in range(0, num_tokens, block):
            _copy_into(results.rows(first, first + block), with_sinks(merged.rows(first, first + block), sinks))
    return results


def workspace_bytes(dtype: torch.dtype, mask: Mask, softcap: float | None, dropout: float, kernel: str | None) -> int:
    """Upper bound of the bytes that the kernel itself allocates."""
    if only_pytorch_runs(dtype, mask, softcap, dropout, kernel):
        return OPERATOR_WORKSPACE + PER_THREAD * torch.get_num_threads()
    return cost.WORKSPACE


def _moved(mask: Mask, device: torch.device) -> Mask:
    tensors = {name: getattr(mask, name) for name in ("key_padding", "query_segments", "key_segments", "bias")}
    return mask.replace(**{name: tensor.to(device) for name, tensor in tensors.items() if tensor is not None})


def _merge_into(rows: Partial, new: Partial) -> None:
    device = rows.out.device
    _copy_into(rows, merge([rows, Partial(new.out.to(device), new.lse.to(device))]))


def _copy_into(rows: Partial, new: Partial) -> None:
    rows.out.copy_(new.out)
    rows.lse.copy_(new.lse)


def _shape(query: Source, key: Source, value: Source) -> cost.CallShape:
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}.")
    batch, heads, _, head_dim = query.shape
    return cost.CallShape(heads, key.shape[1], head_dim, value.shape[3], query.dtype.itemsize, batch)
