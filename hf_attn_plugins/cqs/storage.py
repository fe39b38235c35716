"""Long tensors in files: ranges of tokens are read from memory or a file, and results can be kept in a file."""

from __future__ import annotations

import math
import os
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_attn_plugins.cqs.planning.worker_share import Range
from hf_attn_plugins.cqs.tokens import TOKENS, Tokens


class Source:
    """A (B, H, N, D) array in memory or in a file, of which ranges of tokens are read.

    Args:
        array: a tensor (in memory, or mapped by `torch.from_file`), a NumPy array (`numpy.memmap`), or a slice object
            of a safetensors file (`safetensors.safe_open(path, "pt").get_slice(name)`).

    Raises:
        ValueError: the array is of another kind, or not 4-d.
    """

    def __init__(self, array: Any) -> None:
        self.in_file = not isinstance(array, Tensor)
        self._slice = None
        if isinstance(array, np.ndarray):
            with warnings.catch_warnings():
                # PyTorch warns that a tensor over a read-only file must not be written to. It is only read here.
                warnings.simplefilter("ignore", UserWarning)
                array = torch.from_numpy(array)
        if isinstance(array, Tensor):
            self._tensor, self.shape, self.dtype = array, tuple(array.shape), array.dtype
        elif hasattr(array, "get_shape"):
            self._slice, self.shape = array, tuple(array.get_shape())
            self.dtype = array[:0].dtype
        else:
            raise ValueError(
                f"query, key or value is a {type(array).__name__}: pass a tensor, a NumPy array or a safetensors slice."
            )
        if len(self.shape) != 4:
            raise ValueError(f"query, key and value must be 4-d (batch, heads, tokens, head_dim), got {self.shape}.")

    def read(self, ranges: tuple[Range, ...], device: torch.device | None = None) -> Tokens:
        """The tokens of these ranges on `device` (None: where the array is); a view if it is one range and there."""
        if self._slice is not None:
            parts = [self._slice[:, :, begin:end] for begin, end in ranges]
        else:
            parts = [self._tensor.narrow(TOKENS, begin, end - begin) for begin, end in ranges]
        device = device or parts[0].device
        if len(parts) == 1 and parts[0].device == device:
            return Tokens(parts[0], ranges)
        length = sum(end - begin for begin, end in ranges)
        batch, heads, _, head_dim = self.shape
        held = torch.empty(batch, heads, length, head_dim, dtype=self.dtype, device=device)
        place = 0
        for part in parts:
            waits = device.type == "cuda" and part.device.type == "cpu" and not part.is_pinned()
            held.narrow(TOKENS, place, part.shape[TOKENS]).copy_(
                part.contiguous().pin_memory() if waits else part, non_blocking=True
            )
            place += part.shape[TOKENS]
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # the pinned copies must live until they are transferred
        return Tokens(held, ranges)


def file_tensor(shape: tuple[int, ...], dtype: torch.dtype, folder: str | os.PathLike[str] | None) -> Tensor:
    """A tensor of zeros in a temporary file that has no name; `folder` None is the system's temporary folder."""
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    handle, path = tempfile.mkstemp(suffix=".cqs", dir=folder)
    os.close(handle)
    tensor = torch.from_file(path, shared=True, size=count, dtype=dtype).view(shape)
    os.unlink(path)  # the mapping keeps the space until the tensor is gone
    return tensor
