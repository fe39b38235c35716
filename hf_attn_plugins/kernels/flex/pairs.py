"""The mask and the scores of a call as functions of one pair, which FlexAttention compiles into its kernel.

Numbers are elements of a tensor: as integers of Python, each new offset would be compiled anew. For the same reason a
plan is read from tables: the functions of two plans are one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from hf_attn_plugins.core.mask import Mask
from hf_attn_plugins.kernels.flex import bands
from hf_attn_plugins.kernels.flex.plan import Plan
from hf_attn_plugins.kernels.segment_labels import HIDDEN, Labels

Pairs = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def pairs_seen(
    mask: Mask, labels: Labels | None, rows: int, keys: int, device: torch.device, plan: Plan | None = None
) -> Pairs:
    """The mask as a function of one pair, (b, h, row, key) -> bool, as FlexAttention calls it.

    Args:
        mask: all of it is read but `key_padding` and the segments.
        labels: of its padding and segments, `segment_labels.make_labels`.
        plan: the only pairs that may be seen; None for all.
    """
    causal, (left, right), prefix, predicate = mask.causal, mask.window, mask.prefix, mask.predicate
    numbers = _numbers((left or 0, right or 0, prefix, keys - rows), device)
    offset = numbers[3] if mask.offset is None else _offset(mask.offset, device)
    row_labels, key_labels = (None, None) if labels is None else labels
    bias = _four(mask.bias) if mask.bias is not None and mask.bias.dtype == torch.bool else None
    which, row_bands, key_bands, entries = (None,) * 4 if plan is None else plan[:4]

    def seen(b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        position, entry = row + offset, None
        if row_bands is not None and key_bands is not None and entries is not None:
            own = 0 if which is None else which[b]
            entry = entries[own, row_bands[own, row], key_bands[own, key]]
            position = position + torch.where(entry > bands.WHOLE, entry, 0)
        distance = key - position
        found = key >= 0
        if causal:
            found = found & (distance <= 0)
        if left is not None:
            found = found & (distance >= -numbers[0])
        if right is not None:
            found = found & (distance <= numbers[1])
        if prefix:
            found = found | (key < numbers[2])
        if entry is not None:
            found = (found | (entry == bands.WHOLE)) & (entry != bands.HIDDEN)
        if key_labels is not None:
            label = key_labels[_at(key_labels, 0, b), key]
            own_label = 0 if row_labels is None else row_labels[_at(row_labels, 0, b), row]
            found = found & (label == own_label) & (label != HIDDEN)
        if predicate is not None:
            found = found & predicate(b, h, position, key)
        if bias is not None:
            found = found & bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, row), _at(bias, 3, key)]
        return found

    return seen


def scores_of(mask: Mask, softcap: float | None, query: Tensor) -> Callable[..., Tensor] | None:
    """Softcap and float bias as FlexAttention's score function; None where there is neither."""
    bias = _four(mask.bias.detach()) if mask.bias is not None and mask.bias.dtype != torch.bool else None
    if softcap is None and bias is None:
        return None
    cap = None if softcap is None else _cap(softcap, query.device)

    def score(value: Tensor, b: Tensor, h: Tensor, row: Tensor, key: Tensor) -> Tensor:
        if cap is not None:
            value = cap * torch.tanh(value / cap)
        if bias is not None:
            value = value + bias[_at(bias, 0, b), _at(bias, 1, h), _at(bias, 2, row), _at(bias, 3, key)]
        return value

    return score


def _at(tensor: Tensor, dim: int, index: Tensor) -> Tensor | int:
    return index if tensor.shape[dim] > 1 else 0


def _four(tensor: Tensor) -> Tensor:
    return tensor.reshape((1,) * (4 - tensor.ndim) + tensor.shape)


def _offset(offset: int | Tensor, device: torch.device) -> Tensor:
    return offset.to(device) if isinstance(offset, Tensor) else _numbers((offset,), device)[0]


@functools.lru_cache(maxsize=256)
def _numbers(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # a tensor of inference mode could not be kept for a later gradient
        return torch.tensor(numbers, dtype=torch.int32, device=device)


@functools.lru_cache(maxsize=16)
def _cap(softcap: float, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(softcap, dtype=torch.float32, device=device)
