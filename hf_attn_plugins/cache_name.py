"""By what name a model takes and returns its cache: moved to `hf/compat.py`."""

from __future__ import annotations

from hf_attn_plugins.hf.compat import NAMES, cache_keyword, returned_cache, set_returned_cache

__all__ = ["NAMES", "cache_keyword", "returned_cache", "set_returned_cache"]
