"""RULER's words, read at import: for the server of tests/forks.py, whose children then have them."""

from __future__ import annotations

from hf_attn_plugins.eval.tasks.words import nouns_and_adjectives, vocabulary

nouns_and_adjectives(), vocabulary()
