"""Which modules of a model attend, read from their source."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from hf_attn_plugins.hf.models.families import class_source

ASKS = ("ALL_ATTENTION_FUNCTIONS", "attention_interface")


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """Every module of a model that projects and attends itself, rather than wraps such a module."""
    return [module for module in model.modules() if is_attention(module)]


def is_attention(module: nn.Module) -> bool:
    """Whether a module projects and attends itself."""
    kind: Any = type(module)
    if "attention" not in kind.__name__.lower():
        return False
    source = class_source(kind)
    if asks_registry(module) or isinstance(module, nn.MultiheadAttention):
        return True
    return "softmax" in source or "scaled_dot_product_attention" in source


def asks_registry(module: nn.Module) -> bool:
    """Whether a module looks its attention function up in Transformers' registry."""
    source = class_source(_kind(module))
    return any(word in source for word in ASKS)


def takes_mask(module: nn.Module) -> bool:
    """Whether a module that attends by itself is handed the model's mask; a pooling head is not."""
    if isinstance(module, nn.MultiheadAttention):
        return False
    return any("mask" in name or name == "kwargs" for name in inspect.signature(module.forward).parameters)


def takes_mask_for_padding(module: nn.Module) -> bool:
    """Whether a router of experts reads the attention mask as a padding mask (NLLB-MoE): it counts on sdpa's None."""
    return "router_ignore_padding_tokens" in class_source(_kind(module))


def sparse_keyword(module: nn.Module) -> str | None:
    """The keyword by which a module hands over its own choice of keys; None where it does not."""
    source = class_source(_kind(module))
    return next((word for word in ("block_indices", "indices") if f"{word}=" in source), None)


def _kind(module: nn.Module) -> Any:
    return type(module)
