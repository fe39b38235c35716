"""Random weights under which an error of attention shows: sharp softmax, no gate at zero, no layer scaled away."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# Names of what projects queries and keys, fused projections included.
QUERY_KEY = re.compile(
    r"(^|[._])(q|k|qk|qkv|q_proj|k_proj|query|key|qkv_proj|query_key_value|wqkv|c_attn|in_proj|to_q|to_k|q_lin|k_lin"
    r"|wq|wk|att_proj|query_proj|key_proj|linear_q|linear_k|q_b_proj|kv_b_proj|q_up_proj|in_proj_weight|q_linear"
    r"|k_linear|query_projection|key_projection)([._]weight)?$",
    re.IGNORECASE,
)
QUERY_NORM = re.compile(r"(q_norm|k_norm|q_layernorm|k_layernorm|query_norm|key_norm|q_ln|k_ln|qk_norm)", re.IGNORECASE)
LEVELS = {"sharp": 2.5, "mild": 1.5, "plain": None}  # the factor of query and key projections


def randomize(model: nn.Module, level: str, seed: int = 0) -> None:
    """Draw a model's weights anew: matrices with unit gain, queries and keys larger, constants off their constant.

    Args:
        level: "sharp", "mild", or "plain", which leaves the model's own initial weights as they are.
    """
    factor = LEVELS[level]
    if factor is None:
        return
    generator = torch.Generator().manual_seed(seed)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float32).to(like.dtype)

    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point() or not weight.numel():
                continue
            constant = float(weight.max()) == float(weight.min())
            if weight.ndim >= 2 and "embed" not in name.lower() and ("weight" in name or "proj" in name or constant):
                fan_in = weight[0].numel() if weight.ndim != 3 or "conv" in name else weight.shape[-1]
                weight.copy_(noise(weight) / max(1, fan_in) ** 0.5)
            elif weight.ndim >= 2 and "embed" in name.lower():
                weight.copy_(noise(weight) * 0.5)
            elif constant:
                middle = float(weight.flatten()[0])
                middle = middle if abs(middle) >= 0.3 or middle == 0 else 0.5  # a layer's scale of 1e-5
                weight.add_(noise(weight) * 0.2 + middle - weight)
            if QUERY_KEY.search(name) and weight.ndim >= 2:
                weight.mul_(factor)
            elif QUERY_NORM.search(name) and weight.ndim == 1:
                weight.add_(factor - 1)  # normalised queries forget the scale of their projection


@contextlib.contextmanager
def perturbed(model: Any, seed: int = 1) -> Iterator[None]:
    """Every weight changed by about one rounding step of float32, restored afterwards."""
    generator = torch.Generator().manual_seed(seed)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    try:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    noise = torch.randn(parameter.shape, generator=generator)
                    parameter.mul_((1 + torch.finfo(torch.float32).eps * noise).to(parameter.dtype))
        yield
    finally:
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                parameter.copy_(old)
