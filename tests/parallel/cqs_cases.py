"""What the ranks do in the tests of CQS over ranks: functions of (rank, size, ...) that return JSON-ready values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.commands.bench.parallel import rank as bench_rank
from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.parallel import Group, cqs_exchange
from hf_attn_plugins.parallel.cqs_plan import rank_plan
from hf_attn_plugins.testing import dense_attention, sharp_inputs, visibility


def exchange(
    rank: int, size: int, tokens: int, workers: int | None, is_causal: bool, rounds: int, padding: int
) -> dict[str, Any]:
    """Attention of shards on a real group against dense attention over everything: errors, and bytes counted."""
    plan = rank_plan(tokens, size, workers, None, is_causal, rounds)
    whole = sharp_inputs(2, 4, 2, tokens, tokens, 6, 5, dtype=torch.float64, seed=tokens)
    real = torch.ones(2, tokens, dtype=torch.bool)
    real[1, :padding] = False
    seen = visibility(tokens, tokens, is_causal=is_causal, key_padding=real)
    generator = torch.Generator().manual_seed(1)
    grad_out = torch.randn(2, 4, tokens, 5, generator=generator, dtype=torch.float64)
    grad_lse = torch.randn(2, 4, tokens, generator=generator, dtype=torch.float64) * seen.any(-1)
    shard = slice(*plan.shards[rank])
    mine = [x[:, :, shard].clone().requires_grad_() for x in whole]
    group = Group.join(timeout=30)
    mask = Mask(causal=is_causal, key_padding=real)
    out, lse = cqs_exchange.attention(*mine, plan, group, mask=mask)
    grads = torch.autograd.grad([out, lse], mine, [grad_out[:, :, shard], grad_lse[:, :, shard]])
    traffic = group.traffic.as_dict()
    group.leave()
    for x in whole:
        x.requires_grad_()
    ref, ref_lse = dense_attention(*whole, seen)
    finite = torch.where(seen.any(-1), ref_lse, 0)
    expected = [ref, ref_lse, *torch.autograd.grad([ref, finite], whole, [grad_out, grad_lse])]
    return {"errors": [error_of(a, b[:, :, shard]) for a, b in zip([out, lse, *grads], expected)], "traffic": traffic}


def error_of(found: Tensor, wanted: Tensor) -> float:
    difference = torch.where(found == wanted, 0, (found - wanted).abs())
    return difference.nan_to_num(torch.inf).max().item() if found.numel() else 0.0


def bench(rank: int, size: int, path: str) -> None:
    """What `hf-attn bench parallel` lets a rank do."""
    bench_rank.main(Path(path))
