"""Exact attention by a plan: Scheduler's leaves, Workers one by one, Tiler; on GPUs all Workers in one launch."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask, Window, one_mask
from hf_attn_plugins.core.partial import Partial, with_sinks
from hf_attn_plugins.cqs.cost import parse_bytes
from hf_attn_plugins.cqs.rectangles import of_plan
from hf_attn_plugins.cqs.scheduler import Plan
from hf_attn_plugins.cqs.sub_masks import check_lengths
from hf_attn_plugins.cqs.tiler import Tiler
from hf_attn_plugins.cqs.tokens import TOKENS, Tokens
from hf_attn_plugins.cqs.worker_share import Leaf
from hf_attn_plugins.cqs.workers import work
from hf_attn_plugins.kernels.attend_rectangles import attend_rectangles
from hf_attn_plugins.kernels.choose import choose_rectangles


def attention(
    query: Any,
    key: Any,
    value: Any,
    plan: Plan | None = None,
    *,
    is_causal: bool = False,
    mask: Mask | Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | Window | None = None,
    dropout: float = 0.0,
    sinks: Tensor | None = None,
    kernel: str | None = None,
    memory_budget: str | int | None = None,
    device: torch.device | str | None = None,
    out: Tensor | None = None,
    folder: str | os.PathLike[str] | None = None,
) -> Partial:
    """Exact self-attention, divided among the workers of `plan` and merged; every pair of positions computed once.

    Differentiable in query, key, value, sinks and a float mask, through both results. The workers run one after another
    here, or, with the kernel "triton" (which GPUs take), all in one launch over the cells that they keep: on a device
    that holds every token anyway, one worker at a time would only leave it idle, and their partial results cost memory.
    `work` and `Tiler` are the parts for running workers anywhere else, one by one.

    With `memory_budget` the workers run one after another everywhere, and all that is allocated besides the inputs and
    the returned pair stays within that many bytes on the computing device; a plan that fits is chosen when none is
    given, and there are no gradients. Then query, key and value may also be NumPy arrays (`numpy.memmap`) or slice
    objects of safetensors files, read range by range.

    Args:
        query: (B, Hq, N, D), of any float dtype.
        key, value: (B, Hkv, N, D) and (B, Hkv, N, Dv) with the query's dtype; Hq a multiple of Hkv.
        plan: made by `plan` for N tokens.
        is_causal, scale, softcap, window, dropout, kernel: as in `kernels.attend`.
        mask: a `Mask` over all N x N pairs, or a bool or float tensor that broadcasts to (B, Hq, N, N).
        sinks: (Hq,) logits that take part in every row's softmax and hold no value.
        memory_budget: bytes, as a number or like "512MiB".
        device: where to compute when the inputs are elsewhere; only with a budget.
        out: tensor for the result, for example mapped from a file; only with a budget. When None it is made in memory,
            or in a nameless temporary file if any input is a file.
        folder: where temporary files go; low-precision results are merged in a float32 one. Only with a budget.

    Returns:
        `Partial`, a pair (out, lse): out (B, Hq, N, Dv) in the query's dtype, lse (B, Hq, N) in float32 (float64 for
        float64), the sinks included.

    Raises:
        ValueError: the plan is missing, for another length or too large for the budget, or an argument does not fit;
            the message says which.
    """
    whole = one_mask(mask, is_causal, window)
    if memory_budget is not None:
        if torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in (query, key, value)):
            raise ValueError("memory_budget computes no gradients: call it under torch.no_grad(), or leave it out.")
        from hf_attn_plugins.cqs.streaming import stream

        return stream(
            query, key, value, plan, budget=parse_bytes(memory_budget), mask=whole, scale=scale, softcap=softcap,
            dropout=dropout, sinks=sinks, kernel=kernel, device=device, out=out, folder=folder,
        )  # fmt: skip
    if plan is None or not (device is None and out is None and folder is None):
        raise ValueError("plan may be left out, and device, out and folder be given, only with a memory_budget.")
    check_lengths(query.shape[TOKENS], key.shape[TOKENS], plan, whole)
    if choose_rectangles(query, key, value, whole, softcap, dropout, kernel) is not None:
        # A prefix is seen from before it, so its blocks above the diagonal count although the rest is causal.
        rectangles = of_plan(plan, whole.causal and not whole.prefix)
        part = attend_rectangles(
            query, key, value, rectangles, mask=whole.replace(offset=0), scale=scale, softcap=softcap, dropout=dropout,
            kernel=kernel,
        )  # fmt: skip
        return with_sinks(part, sinks)
    leaves = list(plan.leaves())
    cuts = _cuts(leaves) if torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value)) else None
    tokens = [Tokens(x, cuts=cuts) for x in (query, key, value)]
    tiler = Tiler(leaves, query, value.shape[-1])
    for leaf in leaves:
        tiler.add(work(leaf, *tokens, mask=whole, scale=scale, softcap=softcap, dropout=dropout, kernel=kernel))
    return with_sinks(tiler.result(), sinks)


def _cuts(leaves: list[Leaf]) -> list[int]:
    return sorted({end for leaf in leaves for pair in leaf.ranges for end in pair})
