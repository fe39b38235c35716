"""What the kernel "triton" can compute, known without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

from hf_attn_plugins.core.gpu import arch_of, generation
from hf_attn_plugins.core.mask import Mask

MAX_HEAD_DIM = 256
INSTALLED = importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1: Triton's interpreter then runs the kernels on CPU tensors, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def reason_against(
    query: Tensor, key: Tensor, value: Tensor, mask: Mask, softcap: float | None, dropout: float
) -> str | None:
    """Why `triton` cannot compute this call; None when it can."""
    if not INSTALLED:
        return "anything, because Triton is not installed (pip install 'hf-attn-plugins[triton]')"
    if query.device.type in ("cpu", "meta") and not interpreting():
        return (
            f"tensors on {query.device.type} (its interpreter can, with TRITON_INTERPRET=1 set before Triton's import)"
        )
    if query.device.type not in ("cuda", "cpu", "meta"):
        return f"tensors on {query.device.type}"
    if query.device.type == "cuda" and 0 < generation(arch_of(query.device)) < 80:
        return "GPUs older than sm_80"
    if query.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{query.dtype}"
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        return f"a head_dim above {MAX_HEAD_DIM}"
    if mask.predicate is not None:
        return "a predicate in the mask (a Python function)"
    if mask.bias is not None and mask.bias.requires_grad:
        return "a float mask that needs a gradient"
    return None
