"""Star Attention written down once more, plainly: its mask as a tensor, and the past that no later token may change."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_attn_plugins.hf.scan import runs


def star_mask(ids: Tensor, block_size: int, anchor_size: int, query_size: int) -> Tensor:
    """The pairs of Star Attention as a float mask (B, 1, T, T), 0 where attended (arXiv 2411.17116, section 2)."""
    length = ids.shape[1]
    query = torch.arange(length).view(-1, 1)
    key = torch.arange(length).view(1, -1)
    context = length - query_size
    near = (key < anchor_size) | (key // block_size == query // block_size) | (query >= context)
    seen = near & (key <= query)
    mask = torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    return mask.expand(ids.shape[0], 1, length, length).contiguous()


def leaks(model: Any, arguments: dict[str, Any], before: runs.Values) -> float | None:
    """How far another last token moves the outputs at all earlier positions; None where no output has positions."""
    ids = arguments["input_ids"].clone()
    ids[:, -1] = (ids[:, -1] - 5 + 7) % 90 + 5
    after = runs.forward(model, {**arguments, "input_ids": ids})
    length = ids.shape[1]
    past = {n: v[:, :-1] for n, v in before.items() if v.ndim >= 3 and v.shape[1] == length}
    return runs.difference(past, {n: after[n][:, :-1] for n in past}).relative if past else None
