"""Whether autograd records a computation."""

from __future__ import annotations

import torch
from torch import Tensor


def needs_gradient(*tensors: Tensor) -> bool:
    """Whether autograd records what is computed from these tensors: gradients are on, and one tensor requires one."""
    if torch.is_grad_enabled():
        for tensor in tensors:  # not `any`, which takes longer: every short call asks
            if tensor.requires_grad:
                return True
    return False
