"""By what name a model takes and returns its cache: `cache` from Transformers 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

NAMES = ("cache", "past_key_values")


def cache_keyword(model: nn.Module) -> str:
    """The keyword of `model.forward` (and of its `generate`) for the cache."""
    return NAMES[0] if NAMES[0] in inspect.signature(model.forward).parameters else NAMES[1]


def returned_cache(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, _attribute(output))


def set_returned_cache(output: Any, cache: Any) -> None:
    """Put another cache (or None) into a model's output."""
    setattr(output, _attribute(output), cache)


def _attribute(output: Any) -> str:
    return NAMES[0] if hasattr(output, NAMES[0]) else NAMES[1]


def registered_names() -> set[str]:
    """Every attention implementation that Transformers knows by name (`AttentionInterface._global_mapping`)."""
    from transformers import AttentionInterface

    return set(AttentionInterface._global_mapping)


def forget_attention(name: str) -> None:
    """Take a name out of both registries: Transformers has `register`, and no public way back."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface._global_mapping.pop(name, None)
    AttentionMaskInterface._global_mapping.pop(name, None)
