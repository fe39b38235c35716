"""Exact attention by a plan: its workers run one by one and are merged, or run all at once where a kernel can."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.core.gradient import needs_gradient
from hf_attn_plugins.core.mask import Mask, Window, one_mask
from hf_attn_plugins.core.partial import Partial, with_sinks
from hf_attn_plugins.cqs.planning.cost import parse_bytes
from hf_attn_plugins.cqs.planning.rectangles import of_plan
from hf_attn_plugins.cqs.planning.scheduler import Plan
from hf_attn_plugins.cqs.planning.worker_share import Leaf
from hf_attn_plugins.cqs.sub_masks import check_lengths
from hf_attn_plugins.cqs.tiler import Tiler
from hf_attn_plugins.cqs.tokens import TOKENS, Tokens
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
    """Exact self-attention: the workers of `plan` compute every pair of positions once, and their results are merged.

    Differentiable in query, key, value, sinks and a float mask, through both results. A kernel that takes rectangles
    ("flex" and "triton" on GPUs, "cpu_fused" on CPUs) computes the pairs of all workers in one launch. Otherwise the
    workers run one after another. To run workers elsewhere, use `work` and `Tiler`.

    With `memory_budget` the workers always run one after another. Besides the inputs and the result, at most that many
    bytes are allocated on the computing device. No gradients are computed. Query, key and value may then also be NumPy
    arrays (`numpy.memmap`) or slice objects of safetensors files; both are read range by range.

    Args:
        query: (B, Hq, N, D), of any float dtype.
        key, value: (B, Hkv, N, D) and (B, Hkv, N, Dv) with the query's dtype; Hq a multiple of Hkv.
        plan: made by `plan` for N tokens; None, only with a budget, chooses one that fits.
        is_causal, scale, softcap, window, dropout, kernel: as in `kernels.attend`.
        mask: a `Mask` over all N x N pairs, or a bool or float tensor that broadcasts to (B, Hq, N, N).
        sinks: (Hq,) learned logits: each adds exp(sink) to the denominator of every row's softmax, and no value.
        memory_budget: bytes, as a number or like "512MiB".
        device: where to compute when the inputs are elsewhere; only with a budget.
        out: (B, Hq, N, Dv) in the query's dtype, for the result, for example mapped from a file; only with a budget.
            None takes memory, or a temporary file if any input is a file.
        folder: where temporary files go; only with a budget. Results below float32 are merged in a float32 file.

    Returns:
        `Partial`, a pair (out, lse): out (B, Hq, N, Dv) in the query's dtype, lse (B, Hq, N) in float32 (float64 for
        float64). Both include the sinks.

    Raises:
        ValueError: the plan is missing, is for another length or needs more than the budget, or an argument does not
            fit; the message says which.
        NotImplementedError: the named kernel cannot compute this call.

    Source: CQS-Attention, IEEE Access 13 (2025) 35527; workers one after another: Stream-CQSA, arXiv 2604.20819.
    """
    whole = one_mask(mask, is_causal, window)
    if memory_budget is not None:
        if needs_gradient(*(x for x in (query, key, value) if isinstance(x, Tensor))):
            raise ValueError(
                "memory_budget gives no gradients: call under torch.no_grad(), or leave memory_budget out."
            )
        from hf_attn_plugins.cqs.streaming import stream

        return stream(
            query, key, value, plan, budget=parse_bytes(memory_budget), mask=whole, scale=scale, softcap=softcap,
            dropout=dropout, sinks=sinks, kernel=kernel, device=device, out=out, folder=folder,
        )  # fmt: skip
    if plan is None:
        raise ValueError("plan is missing: pass cqs.plan(num_tokens, num_workers), or a memory_budget to choose one.")
    given = [name for name, x in (("device", device), ("out", out), ("folder", folder)) if x is not None]
    if given:
        raise ValueError(f"{', '.join(given)} needs a memory_budget: pass one, or leave {', '.join(given)} out.")
    check_lengths(query.shape[TOKENS], key.shape[TOKENS], plan, whole)
    whole = whole.dropping(dropout, query, key)
    if choose_rectangles(query, key, value, whole, softcap, dropout, kernel) is not None:
        # Rows before and inside of a prefix see all of it, so pairs above the diagonal are needed, too.
        rectangles = of_plan(plan, whole.causal and not whole.prefix)
        part = attend_rectangles(
            query, key, value, rectangles, mask=whole.replace(offset=0), scale=scale, softcap=softcap, dropout=dropout,
            kernel=kernel,
        )  # fmt: skip
        return with_sinks(part, sinks)
    leaves = list(plan.leaves())
    cuts = _cuts(leaves) if needs_gradient(query, key, value) else None
    tokens = [Tokens(x, cuts=cuts) for x in (query, key, value)]
    tiler = Tiler(leaves, query, value.shape[-1])
    for leaf in leaves:
        tiler.add(work(leaf, *tokens, mask=whole, scale=scale, softcap=softcap, dropout=dropout, kernel=kernel))
    return with_sinks(tiler.result(), sinks)


def _cuts(leaves: list[Leaf]) -> list[int]:
    return sorted({end for leaf in leaves for pair in leaf.ranges for end in pair})
