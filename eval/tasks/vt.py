"""RULER's variable tracking: a chain of assignments in noise, after one worked example."""

from __future__ import annotations

import functools
import itertools
import random
import string

from ..prompts import Parts
from ..running.fitting import largest
from .niah import NOISE
from .ruler import Question, RulerTask

HOPS = 4
BEFORE = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
AFTER = "\nQuestion: Find all variables that are assigned the value {value} in the text above."
PREFIX = (
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assigned the value {value}, they are: "
)
EXAMPLE_TOKENS = 500
LEAST_NOISE = 5


class VariableTracking(RulerTask):
    """vt: one chain of four hops; the references are the five variables that hold the value."""

    max_new_tokens = 30
    least = LEAST_NOISE

    def question(self, units: int, length: int, draw: random.Random, index: int) -> Question:
        example = _asked(self.example_noise, 3, draw)
        names, value, context = _asked(units, 5, draw)
        asked = {"value": value, "count": HOPS + 1}
        shown = _worked(*example) + "\n\n"
        parts = Parts(shown + BEFORE + context, AFTER.format(**asked), PREFIX.format(**asked), f"\n{NOISE}" * 2)
        return Question(parts, names)

    @functools.cached_property
    def example_noise(self) -> int:
        """Noise of the worked example, which is filled up to 500 tokens."""

        def count(noise: int) -> int:
            return len(self.setting.prompter.ids(_worked(*_asked(noise, 3, random.Random(0)))))

        return largest(count, EXAMPLE_TOKENS, LEAST_NOISE, EXAMPLE_TOKENS) or LEAST_NOISE


def _worked(names: list[str], value: str, context: str) -> str:
    asked = {"value": value, "count": HOPS + 1}
    return BEFORE + context + AFTER.format(**asked) + PREFIX.format(**asked) + " " + " ".join(names)


def _asked(noise: int, letters: int, draw: random.Random) -> tuple[list[str], str, str]:
    """(variables in order, their value, the context)"""
    found: dict[str, None] = {}
    while len(found) <= HOPS:
        found["".join(draw.choices(string.ascii_uppercase, k=letters))] = None
    names, value = list(found), str(draw.randint(10_000, 99_999))
    chain = [f"VAR {names[0]} = {value}"]
    chain += [f"VAR {name} = VAR {earlier} " for earlier, name in itertools.pairwise(names)]
    sentences = [NOISE] * noise
    places = sorted(draw.random() for _ in chain)  # drawn before anything that depends on the noise
    for place, assignment in sorted(zip(places, chain, strict=True), key=lambda pair: -pair[0]):
        sentences.insert(int(place * (noise + 1)), assignment)
    return names, value, "\n".join(sentences).replace(". \n", ".\n")
