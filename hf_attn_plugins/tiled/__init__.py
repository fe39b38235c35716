"""Tiled attention: FlashAttention-style tiles, and their plan drawn and walked through."""

from __future__ import annotations

from hf_attn_plugins.core.lazy import lazy

__all__ = ["attention"]

__getattr__, __dir__ = lazy(__name__, {"attention": f"{__name__}.entry:attention"})
