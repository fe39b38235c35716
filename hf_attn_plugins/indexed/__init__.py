"""Indexed attention (ISDPA): attention that starts from character indices, by look-up in small tables."""

from __future__ import annotations

from hf_attn_plugins.indexed.attention import indexed_attention, indexed_scores, indexed_values, pooled_values
from hf_attn_plugins.indexed.combine import Concatenate, Stack2D
from hf_attn_plugins.indexed.direct import direct_attention
from hf_attn_plugins.indexed.modules import IndexedCharacterAttention, WordEncoder
from hf_attn_plugins.indexed.tables import Projections, Tables, build_tables, sinusoids
from hf_attn_plugins.indexed.words import Vocabulary

__all__ = [
    "Concatenate",
    "IndexedCharacterAttention",
    "Projections",
    "Stack2D",
    "Tables",
    "Vocabulary",
    "WordEncoder",
    "build_tables",
    "direct_attention",
    "indexed_attention",
    "indexed_scores",
    "indexed_values",
    "pooled_values",
    "sinusoids",
]
