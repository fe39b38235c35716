"""Tensors as flat bytes and back, so that tensors of several dtypes travel in one message."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_bytes(tensor: Tensor) -> Tensor:
    """The elements as a flat uint8 tensor, detached; a view where the tensor is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def from_bytes(message: Tensor, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The inverse of `to_bytes`: a tensor of `dtype` and `shape` from a flat uint8 message.

    The result is a view of the message, or a copy where the byte offset is not aligned to the dtype.
    Example: a float32 message at byte offset 2 are copied, because 2 is no multiple of 4.
    """
    if message.storage_offset() % dtype.itemsize:
        message = message.clone()
    return message.view(dtype).view(tuple(shape))


def num_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """The bytes that a tensor of this shape and dtype takes in a message."""
    return torch.Size(shape).numel() * dtype.itemsize
