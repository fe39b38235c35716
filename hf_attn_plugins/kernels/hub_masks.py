"""The mask tensor of an exported kernel's call as a structure, where it holds no more than padding, order and window.

Kernels skip tiles of a structure. A T x S tensor is read whole by every layer, and fewer kernels take one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_attn_plugins.core.compat import is_fake, version_of
from hf_attn_plugins.core.mask import Mask, window_of

ROWS = 1024  # rows of a mask that are compared at once
_KEPT = "_hf_attn_padding"  # on the tensor: all layers of a forward get the same one


def structured(given: Tensor, query: Tensor, key: Tensor, causal: bool, window: int | None) -> Mask | None:
    """The mask tensor of a call as a structure; None where it says something else, or that cannot be known.

    Args:
        given: (B, S) whole numbers or bool, True for real keys, as flash-attention's mask function makes it; or what
            `sdpa_mask` makes, bool (B, 1, T, S), True for pairs that attend.
        query, key: (B, Hq, T, D) and (B, Hkv, S, D); only their shapes are read.
        causal, window: what the call says of a (B, S) mask; the rows are then the last T of the S places.

    Raises:
        ValueError: a 2-d mask of floats, or of another width than the keys.
    """
    batch, num_rows, num_keys = query.shape[0], query.shape[2], key.shape[2]
    if given.ndim == 2:
        return _padding_of_keys(given, (batch, num_rows, num_keys), causal, window)
    if torch.compiler.is_compiling() or given.is_meta or given.dtype != torch.bool or given.ndim != 4:
        return None
    if given.shape[:2] != (batch, 1) or given.shape[3] != num_keys:
        return None
    if given.shape[2] == 1 or given.stride(2) == 0:  # one row, or all rows alike
        return Mask(key_padding=given[:, 0, 0])
    if given.shape[2] != num_rows or is_fake(given):
        return None
    padding = _kept_padding(given, window)
    if padding is None:
        return None
    return Mask(causal=True, window=window_of(window), offset=num_keys - num_rows, key_padding=padding)


def _padding_of_keys(given: Tensor, shape: tuple[int, int, int], causal: bool, window: int | None) -> Mask:
    batch, num_rows, num_keys = shape
    if given.is_floating_point():
        raise ValueError(f"a mask (batch, keys) is bool or whole numbers, got {given.dtype}: pass .bool().")
    if given.shape != (batch, num_keys):
        raise ValueError(
            f"the mask has shape {tuple(given.shape)}, the call needs (batch, keys) = {(batch, num_keys)}."
        )
    left, right = window_of(window)
    right = right if causal or left is None else left  # flash-attention's window of a call without order
    return Mask(causal=causal, window=(left, right), offset=num_keys - num_rows, key_padding=given.bool())


def _kept_padding(given: Tensor, window: int | None) -> Tensor | None:
    """`padding_under_order`, kept on the tensor until it is changed: all layers of a forward ask the same question."""
    question = (version_of(given), window)
    if question[0] < 0:  # an inference tensor: a change could not be noticed
        return padding_under_order(given, window)
    kept = given.__dict__.get(_KEPT)
    if kept is None or kept[0] != question:
        kept = (question, padding_under_order(given, window))
        given.__dict__[_KEPT] = kept
    found: Tensor | None = kept[1]
    return found


def padding_under_order(given: Tensor, window: int | None) -> Tensor | None:
    """(B, S) padding of a mask that is padding and causal order (and window) and no more; None for any other mask.

    Row t stands at place S - T + t. Reads the mask twice, and holds `ROWS` rows of it.
    """
    seen = given[:, 0]
    _, num_rows, num_keys = seen.shape
    padding = seen.any(1)
    keys = torch.arange(num_keys, device=given.device)
    for first in range(0, num_rows, ROWS):
        rows = seen[:, first : first + ROWS]
        place = torch.arange(first, first + rows.shape[1], device=given.device).unsqueeze(1) + num_keys - num_rows
        order = keys <= place
        if window is not None:
            order &= keys > place - window
        if not torch.equal(rows, order & padding.unsqueeze(1)):
            return None
    return padding
