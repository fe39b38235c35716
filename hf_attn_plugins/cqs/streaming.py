"""Bounded memory: workers one after another, inputs and results wherever they lie, held within a budget of bytes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

import hf_attn_plugins.cqs.cost as cost
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, lse_dtype, merge, with_sinks
from hf_attn_plugins.cqs.scheduler import Plan
from hf_attn_plugins.cqs.storage import Source, file_tensor
from hf_attn_plugins.cqs.sub_masks import check_lengths
from hf_attn_plugins.cqs.tiler import Ledger
from hf_attn_plugins.cqs.tokens import TOKENS
from hf_attn_plugins.cqs.workers import work

FUSED_WORKSPACE = 8 * 2**20  # what PyTorch's fused operators allocate, plus `PER_THREAD` for each thread
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
    """See `attention` with `memory_budget`. Rows are merged in place, in float32 (float64), block by block."""
    sources = [Source(x) for x in (query, key, value)]
    shape, dtype = _shape(*sources), sources[0].dtype
    num_tokens = sources[0].shape[TOKENS]
    workspace = workspace_bytes(dtype, mask, softcap, dropout, kernel)
    plan = plan or cost.choose(num_tokens, shape, budget, workspace)
    check_lengths(num_tokens, sources[1].shape[TOKENS], plan, mask)
    peak = cost.streaming_peak(plan, shape, workspace)
    if peak > budget:
        raise ValueError(
            f"this plan holds up to {cost.format_bytes(peak)}, above the budget of {cost.format_bytes(budget)}: leave "
            "the plan out and one that fits is chosen."
        )
    device = torch.device(device) if device is not None else None
    mask = mask if device is None else _moved(mask, device)
    wide = lse_dtype(dtype)
    home = query.device if isinstance(query, Tensor) else torch.device("cpu")
    in_files = any(source.in_file for source in sources)
    rows_shape = (*sources[0].shape[:3], shape.head_dim_v)
    if out is None:
        out = file_tensor(rows_shape, dtype, folder) if in_files else torch.zeros(rows_shape, dtype=dtype, device=home)
    elif tuple(out.shape) != rows_shape or out.dtype != dtype:
        raise ValueError(f"out must be {rows_shape} of {dtype}, got {tuple(out.shape)} of {out.dtype}.")
    total = out.zero_() if dtype == wide else file_tensor(rows_shape, wide, folder)
    lse = torch.full(rows_shape[:3], -torch.inf, dtype=wide, device=out.device)
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
                        _merge_into(total, lse, partial, begin, first, min(end, first + block))
                del queries, result
            ledger.admit(leaf.path)
            del keys, values
        ledger.require_all()
        for first in range(0, num_tokens, block):
            part = (slice(None), slice(None), slice(first, first + block))
            final = with_sinks(Partial(total[part], lse[part]), sinks)
            out[part] = final.out.to(dtype)
            lse[part] = final.lse
    return Partial(out, lse)


def workspace_bytes(dtype: torch.dtype, mask: Mask, softcap: float | None, dropout: float, kernel: str | None) -> int:
    """Bytes to set aside for the kernel itself, whichever of them runs."""
    plain = mask.window == (None, None) and not mask.prefix and mask.has_no_tensors()
    fused = plain and softcap is None and not dropout and dtype != torch.bfloat16
    if kernel == "aten" or (kernel is None and fused):
        return FUSED_WORKSPACE + PER_THREAD * torch.get_num_threads()
    return cost.WORKSPACE


def _moved(mask: Mask, device: torch.device) -> Mask:
    held = {name: getattr(mask, name) for name in ("key_padding", "query_segments", "key_segments", "bias")}
    return mask.replace(**{name: tensor.to(device) for name, tensor in held.items() if tensor is not None})


def _merge_into(total: Tensor, lse: Tensor, partial: Partial, begin: int, first: int, end: int) -> None:
    held, rows = (slice(None), slice(None), slice(first, end)), slice(first - begin, end - begin)
    new = Partial(partial.out[:, :, rows].to(total.device), partial.lse[:, :, rows].to(total.device))
    merged = merge([Partial(total[held], lse[held]), new])
    total[held], lse[held] = merged.out, merged.lse


def _shape(query: Source, key: Source, value: Source) -> cost.CallShape:
    if not query.dtype == key.dtype == value.dtype:
        raise ValueError(f"query, key and value must have one dtype, got {query.dtype}, {key.dtype}, {value.dtype}.")
    batch, heads, _, head_dim = query.shape
    return cost.CallShape(heads, key.shape[1], head_dim, value.shape[3], query.dtype.itemsize, batch)
