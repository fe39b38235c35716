"""Tiled attention: the plan "all of it", straight to the kernels."""

from __future__ import annotations

from torch import Tensor

from hf_attn_plugins.kernels import attend
from hf_attn_plugins.masks import Mask
from hf_attn_plugins.options import TiledOptions
from hf_attn_plugins.partial import Partial


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    *,
    scale: float,
    softcap: float | None,
    dropout: float,
    options: TiledOptions,
) -> Partial:
    """Exact attention by the kernel that `options.kernel` names or `kernels.choose` picks; see `kernels.attend`."""
    return attend(query, key, value, mask=mask, scale=scale, softcap=softcap, dropout=dropout, kernel=options.kernel)
