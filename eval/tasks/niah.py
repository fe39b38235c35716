"""RULER's needle-in-a-haystack tasks: keys and values in noise, in other needles, or in an essay."""

from __future__ import annotations

import math
import random
import uuid
from dataclasses import dataclass

from ..prompts import Parts
from .haystacks import Essay, essay_for
from .needles import hide
from .ruler import Question, RulerTask
from .task import Setting
from .words import nouns_and_adjectives

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
BEFORE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n"
)
AFTER = "\nWhat are all the special magic {kind} for {query} mentioned in the provided text?"
PREFIX = " The special magic {kind} for {query} mentioned in the provided text are"
GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it spread evenly over 0 .. 1, however many samples there are


@dataclass(frozen=True)
class Kind:
    """A row of RULER's table: haystack "noise", "needle" or "essay"; kinds of keys and values; how many of them."""

    haystack: str
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


KINDS = {
    "niah_single_1": Kind("noise"),
    "niah_single_2": Kind("essay"),
    "niah_single_3": Kind("essay", values="uuids"),
    "niah_multikey_1": Kind("essay", num_keys=4),
    "niah_multikey_2": Kind("needle"),
    "niah_multikey_3": Kind("needle", keys="uuids", values="uuids"),
    "niah_multivalue": Kind("essay", num_values=4),
    "niah_multiquery": Kind("essay", num_keys=4, num_queries=4),
}


class Needles(RulerTask):
    """One of `KINDS`. The depth of the (first) needle asked for is recorded; it spreads evenly over the samples."""

    max_new_tokens = 128

    def __init__(self, name: str, setting: Setting) -> None:
        super().__init__(name, setting)
        self.of = KINDS[name]
        self.essay: Essay | None = essay_for(setting, name) if self.of.haystack == "essay" else None
        self.least = 8 if self.essay else max(1, self.of.num_keys * self.of.num_values)
        nouns_and_adjectives()  # a missing package is reported before anything runs

    @property
    def title(self) -> str:
        return self.name if self.essay is None else self.name + self.essay.suffix

    def question(self, units: int, length: int, draw: random.Random, index: int) -> Question:
        of = self.of
        keys = _distinct(of.keys, of.num_keys, draw)
        values = [_distinct(of.values, of.num_values, draw) for _ in keys]
        needles = [(key, value) for key, row in zip(keys, values, strict=True) for value in row]
        draw.shuffle(needles)
        asked = draw.sample(range(of.num_keys), of.num_queries)
        first = next(i for i, (key, _) in enumerate(needles) if key == keys[asked[0]])
        depths = sorted(draw.random() for _ in needles)
        if len(needles) == 1:
            depths = [(index * GOLDEN + 0.5 / 8) % 1.0]
        texts = [NEEDLE.format(kind=of.values, key=key, value=value) for key, value in needles]
        context, joint, filler = self._haystack(units, draw, set(keys))
        places = [math.floor(depth * (len(context) + 1)) for depth in depths]
        depth = places[first] / max(1, len(context))
        context = hide(context, [[text] for text in texts], places)
        return self._asked(joint.join(context), filler, [keys[i] for i in asked], depth, values, asked)

    def _haystack(self, units: int, draw: random.Random, taken: set[str]) -> tuple[list[str], str, str]:
        """(units, what joins them, filler): the filler goes on as one unit more would."""
        of = self.of
        if self.essay is not None:
            sentences = self.essay.sentences(units + 2)
            return sentences[:units], " ", "".join(" " + sentence for sentence in sentences[units:])
        if of.haystack == "noise":
            return [NOISE] * units, "\n", f"\n{NOISE}" * 2
        others: list[str] = []
        while len(others) < units + 2:
            key = _one(of.keys, draw)
            if key not in taken:
                others.append(NEEDLE.format(kind=of.values, key=key, value=_one(of.values, draw)))
        return others[:units], "\n", "".join("\n" + other for other in others[units:])

    def _asked(
        self, context: str, filler: str, keys: list[str], depth: float, values: list[list[str]], asked: list[int]
    ) -> Question:
        of = self.of
        query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
        before, after, prefix, kind = BEFORE, AFTER, PREFIX, of.values
        if of.num_queries * of.num_values == 1:  # RULER's own rewriting for a single answer
            before, after, prefix = (_singular(text) for text in (before, after, prefix))
            kind = kind[:-1]
        names = {"kind": kind, "query": query}
        parts = Parts(
            before.format(**names) + context, after.format(**names), prefix.format(**names), filler, chat=True
        )
        return Question(parts, [value for i in asked for value in values[i]], depth)


def _singular(text: str) -> str:
    return text.replace("Some", "A").replace("are all", "is").replace("are", "is").replace("answers", "answer")


def _distinct(kind: str, count: int, draw: random.Random) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[_one(kind, draw)] = None
    return list(found)


def _one(kind: str, draw: random.Random) -> str:
    if kind == "numbers":
        return str(draw.randint(1_000_000, 9_999_999))
    if kind == "uuids":
        return str(uuid.UUID(int=draw.getrandbits(128), version=4))
    nouns, adjectives = nouns_and_adjectives()
    return f"{draw.choice(adjectives)}-{draw.choice(nouns)}"
