"""From how many keys on the compiled kernels win over PyTorch's operators: measurements, read by `kernels.choose`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask


class FusedFrom(NamedTuple):
    """Keys from which on the compiled kernels win.

    Attributes:
        rows, full, few: for many rows, for many rows that see all keys, and for a few rows (below `SPLIT_ROWS`).
        most: rows of all heads that share a key head; more of them never win.
        least, most_full, scores: the same where every row sees every key, which is what PyTorch's operator does best:
            the fewest and the most of these rows, and the least rows x keys.
    """

    rows: int
    full: int
    few: int
    most: int = 256
    least: int = 1
    most_full: int = 256
    scores: int = 0

    def few_win(self, query: Tensor, key: Tensor, mask: Mask) -> bool:
        """Whether the compiled kernels win for these few rows."""
        rows, keys = query.shape[2] * (query.shape[1] // key.shape[1]), key.shape[2]
        if keys < self.few or rows > self.most:
            return False
        if mask.causal or not mask.has_no_tensors():
            return True
        return self.least <= rows <= self.most_full and rows * keys >= self.scores


# By instruction set and dtype. Only what was measured stands here (kernels/README.md); anything else is never chosen.
NEVER = 2**62
FUSED_FROM = {
    ("amx", torch.bfloat16): FusedFrom(256, 512, 256, least=2, scores=2048),
    ("avx512_bf16", torch.bfloat16): FusedFrom(96, 96, 256),
    ("avx512", torch.float32): FusedFrom(192, NEVER, 256, most=12, scores=NEVER),
    ("avx2", torch.float32): FusedFrom(192, 256, 128, most=64, most_full=6, scores=2048),
    ("avx2", torch.bfloat16): FusedFrom(192, 512, 128, most_full=16),
    ("avx512", torch.float16): FusedFrom(128, 512, 1024),
    ("avx2", torch.float16): FusedFrom(128, 512, 128),
}
LEAST_ROWS, LEAST_FEW = (min(sizes[i] for sizes in FUSED_FROM.values()) for i in (0, 2))  # short calls ask no more
# The same for a mask tensor alone, which PyTorch's operator takes too. Others with a mask tensor, a softcap or dropout
# would else run in tiles of PyTorch operators: `cpu_fused` wins there at any size.
MASKED_FROM = {
    ("amx", torch.bfloat16): FusedFrom(256, 256, 256, least=2),
    ("avx512_bf16", torch.bfloat16): FusedFrom(64, 64, 256),
    ("avx512", torch.float32): FusedFrom(192, 192, 256, most=12),
    ("avx2", torch.float32): FusedFrom(192, 192, 256, most=12),
    ("avx2", torch.bfloat16): FusedFrom(96, 96, 256),
}
