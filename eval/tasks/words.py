"""The words that RULER draws from: nouns, adjectives and verbs of the package wonderwords."""

from __future__ import annotations

import functools
from typing import Any


@functools.cache
def nouns_and_adjectives() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(nouns, adjectives), each sorted, for keys like "quick-river".

    Raises:
        ImportError: wonderwords is not installed.
    """
    return _words("noun"), _words("adjective")


@functools.cache
def vocabulary() -> tuple[str, ...]:
    """Every distinct word, sorted: what common-words extraction lists."""
    return tuple(sorted({*_words("noun"), *_words("adjective"), *_words("verb")}))


def _words(category: str) -> tuple[str, ...]:
    return tuple(sorted(set(_every_word().filter(include_categories=[category]))))


@functools.cache
def _every_word() -> Any:
    """The package's words and its indices by prefix; building these takes half a second, so it is done once."""
    try:
        from wonderwords import RandomWord
    except ImportError as error:
        raise ImportError("RULER's words need the package wonderwords: pip install 'hf-attn-plugins[eval]'.") from error
    return RandomWord()
