"""Circumstances of a call under which a look-up would not do what a projection does, whatever the weights are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_plugins.core.compat import is_transforming, modes
from hf_attn_plugins.core.gradient import needs_gradient

LINEAR = nn.Linear.forward  # as PyTorch has it


def circumstance(ids: Tensor, modules: Sequence[Any]) -> str | None:
    """Why this call needs the projections themselves, None where tables can take their place.

    Args:
        ids: the call's token ids.
        modules: the embedding, the norm if any, and the projections.
    """
    parameters = [p for module in modules for p in (*module.parameters(recurse=False), *_weights(module))]
    try:
        transformed, watched = is_transforming(), modes()
    except NotImplementedError as gone:  # a model without its tables is right, one that fails is not
        return str(gone)
    if transformed or torch.jit.is_tracing():
        return "the call is transformed or traced (torch.func, vmap, forward-mode gradients, jit)"
    if watched:
        return f"{type(watched[-1]).__name__} sees, and may change, what every operator computes"
    if nn.Linear.forward is not LINEAR:
        return "nn.Linear.forward was replaced"
    if any(type(p) not in (nn.Parameter, Tensor) for p in parameters) or type(ids) is not Tensor:
        return "the first layer's weights are no plain tensors (quantised, distributed or fake ones)"
    if ids.is_meta or any(p.is_meta for p in parameters):
        return "the first layer is offloaded (meta tensors)"
    if needs_gradient(*parameters):
        return "gradients are wanted of the embedding, the first norm or the first projections"
    if torch.is_autocast_enabled(modules[-1].weight.device.type):
        return "autocast casts what the projections compute"
    if ids.is_cuda and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return None


def _weights(module: Any) -> list[Tensor]:
    """Weight and bias as attributes: parametrizations and pruning keep them outside of the parameters."""
    found = (getattr(module, "weight", None), getattr(module, "bias", None))
    return [tensor for tensor in found if isinstance(tensor, Tensor)]
