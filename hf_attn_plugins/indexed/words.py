"""Text to words, words to character indices, and misspellings to train a word encoder with."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LETTERS = "abcdefghijklmnopqrstuvwxyz"
# 62 characters; with padding (index 0) and the unknown character (the last index) there are 64.
ALPHABET = LETTERS + LETTERS.upper() + "0123456789"


@dataclass(frozen=True)
class Vocabulary:
    """Character indices: 0 is padding, alphabet[i] has i + 1, every other character has len(alphabet) + 1.

    Example: `Vocabulary(length=4).encode(["ab?"])` is [[1, 2, 63, 0]].

    Attributes:
        length: L, characters per word; longer words are truncated.
        alphabet: the characters that have an index of their own.

    Raises:
        ValueError: the length is below 1, or a character comes twice in the alphabet.
    """

    length: int = 32
    alphabet: str = ALPHABET

    def __post_init__(self) -> None:
        if self.length < 1:
            raise ValueError(f"length={self.length}: words need at least 1 character.")
        if len(set(self.alphabet)) != len(self.alphabet):
            twice = [c for c, count in Counter(self.alphabet).items() if count > 1]
            raise ValueError(f"the alphabet holds {twice} more than once: name every character once.")

    @property
    def size(self) -> int:
        """n: the alphabet, padding and the unknown character."""
        return len(self.alphabet) + 2

    def encode(self, words: Sequence[str]) -> Tensor:
        """(W, L) int64 indices of the words, padded on the right with 0."""
        index = {character: i + 1 for i, character in enumerate(self.alphabet)}
        unknown, length = len(self.alphabet) + 1, self.length
        flat: list[int] = []
        for word in words:
            row = [index.get(character, unknown) for character in word[:length]]
            flat += row + [0] * (length - len(row))
        return torch.tensor(flat, dtype=torch.int64).view(len(words), length)

    def decode(self, indices: Tensor) -> list[str]:
        """The words of (W, L) indices, the unknown character as U+FFFD."""
        characters = ["", *self.alphabet, "�"]
        return ["".join(characters[i] for i in row) for row in indices.tolist()]


def words_of(text: str) -> list[str]:
    """The words of a text in order: maximal runs of letters and digits."""
    return re.findall(r"[^\W_]+", text)


def by_frequency(words: Iterable[str]) -> list[str]:
    """The distinct words, the most frequent first; words of equal frequency in order of appearance."""
    return [word for word, _ in Counter(words).most_common()]


def misspell(word: str, generator: random.Random) -> str:
    """The word (not empty) with one letter dropped, doubled, replaced, or swapped with the next; never the same."""
    while True:
        at, kind = generator.randrange(len(word)), generator.randrange(4)
        before, letter, after = word[:at], word[at], word[at + 1 :]
        if kind == 0 and len(word) > 1:
            changed = before + after
        elif kind == 1:
            changed = before + letter + letter + after
        elif kind == 2:
            changed = before + generator.choice(LETTERS) + after
        else:
            changed = before + after[:1] + letter + after[1:]
        if changed != word:
            return changed
