"""The kernel called "triton": FlashAttention on NVIDIA (sm_80 and newer) and AMD GPUs, or in Triton's interpreter."""

from __future__ import annotations

from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.core.partial import Partial
from hf_attn_plugins.core.rectangle import Rectangle
from hf_attn_plugins.kernels.segment_labels import make_labels
from hf_attn_plugins.kernels.triton.support import reason_against


def triton(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float
) -> Partial:
    """See `kernels.attend`. Extra memory: float32 partials in decoding, one float32 per row in the backward.

    Raises:
        NotImplementedError: the kernel cannot compute this call; the message gives the reason of `reason_against`.
    """
    return triton_rectangles(query, key, value, mask, scale, softcap, dropout, [])


def triton_rectangles(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, scale: float, softcap: float | None, dropout: float,
    plan: list[list[Rectangle]],
) -> Partial:  # fmt: skip
    """`triton` over the rectangles of `plan` alone, in one launch.

    Args:
        plan: one list of rectangles per row of the batch, or one list for all; [] means every pair.
        query, key, value, mask, scale, softcap, dropout: as in `kernels.attend`.

    Raises:
        NotImplementedError: as `triton`.
    """
    reason = reason_against(query, key, value, mask, softcap, dropout)
    if reason is not None:
        raise NotImplementedError(f"kernel 'triton' cannot do {reason}: use kernel=None to choose another.")
    from hf_attn_plugins.kernels.rectangle_tables import flat
    from hf_attn_plugins.kernels.triton.ops import triton_attention

    rows, num_keys = query.shape[2], key.shape[2]
    if scale <= 0:  # the kernels take the maximum before they scale
        query, scale = (-query, -scale) if scale < 0 else (query * 0, 1.0)
    left, right = mask.window
    if mask.causal:
        right = 0 if right is None else min(right, 0)
    if mask.prefix and (left is not None or right is not None):
        plan = plan or [[Rectangle(0, rows, 0, num_keys, True)]]
        plan = [[part for rectangle in row for part in _beside_prefix(rectangle, mask.prefix)] for row in plan]
    labels = make_labels(mask.key_padding, mask.query_segments, mask.key_segments)
    bias = None if mask.bias is None else mask.bias.detach().expand(*query.shape[:3], num_keys)
    drops = mask.dropping(dropout, query, key).drops
    hashes = (None, None) if drops is None else drops.tables()
    tensor_offset = isinstance(mask.offset, Tensor)
    out, lse, _ = triton_attention(
        query, key, value, labels and labels.rows, labels and labels.keys, bias,
        mask.offset if tensor_offset else None,
        *hashes, scale, softcap, left, right,
        0 if tensor_offset else (num_keys - rows if mask.offset is None else mask.offset), dropout, flat(plan),
    )  # fmt: skip
    return Partial(out, lse)


def _beside_prefix(rectangle: Rectangle, prefix: int) -> list[Rectangle]:
    """Split a position-masked rectangle into the keys of the prefix, which every row sees, and the other keys."""
    cut = min(max(rectangle.key_begin, prefix), rectangle.key_end)
    if not rectangle.position_masked or cut == rectangle.key_begin:
        return [rectangle]
    return [rectangle._replace(key_end=cut, position_masked=False), rectangle._replace(key_begin=cut)]
