"""Tensors to bytes and back, aligned or not."""

from __future__ import annotations

import pytest
import torch

from hf_attn_plugins.core.tensor_bytes import from_bytes, num_bytes, to_bytes

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ((), (0, 3), (5,), (2, 3, 4)))
@pytest.mark.parametrize("before", (0, 1, 2, 4, 8))
def test_what_went_in_comes_out(dtype, shape, before):
    tensor = (torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()] % 2).to(dtype).view(shape)
    sent = to_bytes(tensor)
    assert len(sent) == num_bytes(shape, dtype) == tensor.numel() * tensor.element_size()
    message = torch.cat([torch.full((before,), 77, dtype=torch.uint8), sent])
    got = from_bytes(message[before:], dtype, shape)
    assert got.dtype == dtype and got.shape == tensor.shape and torch.equal(got, tensor)


def test_strided_tensors_are_laid_out_row_by_row():
    tensor = torch.arange(6, dtype=torch.float32).view(2, 3).t()
    assert to_bytes(tensor).numpy().tobytes() == tensor.numpy().tobytes("C")
