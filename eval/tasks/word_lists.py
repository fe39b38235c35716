"""RULER's aggregation tasks: the most common words of a numbered list (cwe), of a coded text (fwe)."""

from __future__ import annotations

import math
import random
import string

from ..prompts import Parts
from .ruler import Question, RulerTask
from .task import Setting
from .words import vocabulary

SHORT = 4096  # below this length RULER repeats words less often
NUM_COMMON = 10


class CommonWords(RulerTask):
    """cwe: ten words stand in the list more often than all others; one worked example before it."""

    max_new_tokens = 120
    least = NUM_COMMON + 1
    BEFORE = (
        "Below is a numbered list of words. In these words, some appear more often than others. "
        "Memorize the ones that appear most often.\n"
    )
    AFTER = "\nQuestion: What are the 10 most common words in the above list?"
    PREFIX = " Answer: The top 10 words that appear most often in the list are:"
    SPARE = 8  # words kept back, of which the filler lists a few once

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.words = vocabulary()

    def most(self, length: int) -> int:
        return min(super().most(length), len(self.words) - self.SPARE)

    def question(self, units: int, length: int, draw: random.Random, index: int) -> Question:
        short = length < SHORT
        example_words = draw.sample(self.words, 20 if short else 40)
        example, example_common = _numbered(example_words, 3 if short else 10, 1 if short else 3, draw)
        found: dict[str, None] = {}  # with more units the first words stay the same
        while len(found) < units + self.SPARE:
            found[self.words[draw.randrange(len(self.words))]] = None
        words = list(found)
        listed, common = _numbered(words[:units], 6 if short else 30, 1 if short else 3, draw)
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(example_common, 1))
        shown = self.BEFORE + " ".join(example) + self.AFTER + self.PREFIX + " " + answer + "\n"
        filler = "".join(f" {i}. {word}" for i, word in enumerate(words[units:], len(listed) + 1))
        parts = Parts(shown + self.BEFORE + " ".join(listed), self.AFTER, self.PREFIX, filler)
        return Question(parts, common)


def _numbered(words: list[str], common: int, rare: int, draw: random.Random) -> tuple[list[str], list[str]]:
    """(entries "1. word" ..., the common words): the first ten words `common` times, the others `rare` times."""
    entries = words[:NUM_COMMON] * common + words[NUM_COMMON:] * rare
    draw.shuffle(entries)
    return [f"{i}. {word}" for i, word in enumerate(entries, 1)], words[:NUM_COMMON]


class FrequentWords(RulerTask):
    """fwe: coded words with zeta-distributed counts (alpha 2); the most frequent, "...", is noise to be ignored."""

    max_new_tokens = 50
    least = 53  # from here on the third and the fourth coded word have different counts
    BEFORE = (
        "Read the following coded text and track the frequency of each coded word. "
        "Find the three most frequently appeared coded words. "
    )
    AFTER = (
        "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. "
        "What are the three most frequently appeared words in the above coded text?"
    )
    PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"
    LETTERS, NOISE = 6, "..."

    def question(self, units: int, length: int, draw: random.Random, index: int) -> Question:
        size = max(5, (length - self.max_new_tokens) // 50)
        found: dict[str, None] = {self.NOISE: None}
        while len(found) < size:
            found["".join(draw.choices(string.ascii_lowercase, k=self.LETTERS))] = None
        words = list(found)
        text = [word for rank, word in enumerate(words, 1) for _ in range(zeta_count(units, rank))]
        draw.shuffle(text)
        return Question(
            Parts(self.BEFORE + " ".join(text), self.AFTER, self.PREFIX, f" {self.NOISE}" * length), words[1:4]
        )


def zeta_count(words: int, rank: int) -> int:
    """How often the word of a rank stands in a text of about `words` words: words * rank**-2 / zeta(2)."""
    return int(words / rank**2 / (math.pi**2 / 6))
