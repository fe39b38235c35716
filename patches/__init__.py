"""Checkpoint patches, one recipe a file; README.md says how to add one."""

from __future__ import annotations

from hf_attn_plugins.patches.recipes import RECIPES

__all__ = ["RECIPES"]
