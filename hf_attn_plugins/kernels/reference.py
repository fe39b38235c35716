"""Plain attention with the whole score matrix: the oracle of the tests, in any dtype, float64 included."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial, lse_dtype


def reference(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. Everything is computed in the dtype of the query; float64 makes it an oracle."""
    batch, heads, rows, _ = query.shape
    num_keys = key.shape[2]
    group_size = heads // key.shape[1]
    key, value = key.repeat_interleave(group_size, 1), value.repeat_interleave(group_size, 1)
    scores = query @ key.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    t, s = torch.arange(rows, device=query.device), torch.arange(num_keys, device=query.device)
    if mask.bias is not None and mask.bias.is_floating_point():
        scores = scores + mask.bias.to(scores.dtype)
    visible = mask.visible(t, s, mask.start(rows, num_keys), batch)
    scores = scores.masked_fill(~visible, -torch.inf)
    lse = torch.logsumexp(scores.to(lse_dtype(query)), -1) if num_keys else Partial.empty(query, 0).lse
    seen = (lse > -torch.inf).unsqueeze(-1)
    # Rows without keys are masked before softmax, so that neither they nor their gradients turn into NaN.
    weights = torch.where(seen, scores, 0).softmax(-1) * seen
    if dropout:
        assert mask.drops is not None
        weights = weights * mask.drops.kept(dropout, weights.dtype)
    return Partial(weights.to(value.dtype) @ value, lse)
