"""`tiled_attention`: the plan is one rectangle, the whole score matrix, so it is one call of a kernel."""

from __future__ import annotations

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.kernels.attend import attend
from hf_attn_plugins.tiled.options import TiledOptions


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
    """Exact attention by the kernel that `options.kernel` names, or that `kernels.choose` chooses when it is None.

    Shapes, dtypes, errors and source are those of `kernels.attend`.
    """
    return attend(query, key, value, mask=mask, scale=scale, softcap=softcap, dropout=dropout, kernel=options.kernel)
