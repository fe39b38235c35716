"""Did you mean: the known name that is nearest to a misspelt one, as a part of an error's sentence."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

ALIKE = 0.6  # ratio of difflib below which two names have nothing to do with each other


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The one of `known` that `word` was probably meant to be; None where none is alike.

    A name counts as a whole, by its first part and by what follows a slash, so that "star", "tilde" and "qasper" find
    "star_attention", "tiled_attention" and "longbench/qasper".
    """
    best, likeness = None, ALIKE
    for name in known:
        for form in {name.lower(), re.split(r"[_:]", name.lower())[0], name.lower().rpartition("/")[2]}:
            ratio = difflib.SequenceMatcher(None, word.lower(), form).ratio()
            if ratio > likeness:
                best, likeness = name, ratio
    return best


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The text " (did you mean 'star_attention'?)", or nothing where no known name is alike."""
    found = nearest(word, known)
    return "" if found is None else f" (did you mean {found!r}?)"
