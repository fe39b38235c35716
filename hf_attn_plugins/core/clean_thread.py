"""Compute in a thread of its own, where PyTorch's dispatcher starts with a clean state.

Inside an operator, and inside `__torch_dispatch__`, the dispatcher records no gradients and knows no vmap.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Result = TypeVar("Result")
_THREAD = ThreadPoolExecutor(1, thread_name_prefix="hf-attn-plugins")


def in_clean_thread(device: torch.device, compute: Callable[[], Result]) -> Result:
    """The result of `compute`, which works on tensors of `device`; its errors are raised here.

    `compute` must not call this function itself.
    """
    return _THREAD.submit(_on_device, device, compute).result()


def _on_device(device: torch.device, compute: Callable[[], Result]) -> Result:
    if device.type != "cuda":
        return compute()
    with torch.cuda.device(device):
        torch.cuda.synchronize(device)
        result = compute()
        torch.cuda.synchronize(device)
        return result
